"""Fields, learned nulls, the dropout plan, molecules."""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rdkit import Chem
from torch.testing import assert_close

import conditioning
import train_ldm
from conditioning import (MOLECULE_ENCODERS, Conditioner, Field, FieldError, Fingerprint,
                          blank_unseen, dose_fields, draw_keep, hide_molecule_of_controls, natural,
                          parse_fields, parse_smiles, read_graph)
from conftest import randomise

ROWS = {"smiles": ["CCO", "c1ccccc1O", "CS(C)=O", ""], "dose": ["1", "10", "0", ""],
        "batch": ["B1", "B10", "B2", ""], "row": ["1", "16", "8", ""]}
GROUPS = {"biology": ["smiles", "dose"], "experiment": ["batch", "row:number"]}


@pytest.fixture
def fields():
    return [f.fit(ROWS[f.name]) for f in parse_fields(GROUPS, ROWS)]


@pytest.fixture
def conditioner(fields):
    return randomise(Conditioner(fields, embedding=32, token=16))


def embed(conditioner, rows, keep=None):
    n = len(next(iter(rows.values())))
    codes, known, molecules = conditioner.encode(rows, n)
    return conditioner(codes, known if keep is None else known & keep, molecules)


def test_kinds_are_told_by_name_or_content(fields):
    assert [f.kind for f in fields] == ["molecule", "log", "category", "number"]
    concentration = parse_fields({"biology": ["conc_um"]}, {"conc_um": ["1"]})
    assert concentration[0].kind == "log"


@pytest.mark.parametrize("specification, columns, says", [
    ("plate", {"plate": ["24277"]}, "plate:category or plate:number"),
    ("plat", {"plate": ["24277"]}, "no column plat"),
    ("plate:colour", {"plate": ["24277"]}, "unknown kind colour"),
    ("true_effect", {"true_effect": ["1"]}, "outcome"),
    ("n_nuclei:number", {"n_nuclei": ["1"]}, "outcome"),
    ("IMG_CNT_CELLS:number", {"IMG_CNT_CELLS": ["1"]}, "outcome"),
    ("smiles", {"smiles": ["CCO", "C1CC"]}, "row 3, column smiles: C1CC"),
    ("age:number", {"age": ["1", "old"]}, "row 3, column age: old"),
    ("dose", {"dose": ["1", "-2"]}, "row 3, column dose: -2")])
def test_faults_are_named(specification, columns, says):
    with pytest.raises(FieldError, match=says.replace("(", r"\(")):
        parse_fields({"biology": [specification]}, columns)


def test_all_faults_are_reported_together():
    with pytest.raises(FieldError) as fault:
        parse_fields({"biology": ["smiles", "nothing:number"]}, {"smiles": ["C1CC", "???"]})
    assert len(str(fault.value).splitlines()) == 3


def test_log_dose_is_its_formula_and_zero_is_legal():
    dose = Field("dose", "log", "biology").fit(["0", "0.3", "1", "10", ""])
    assert dose.low == .3 and dose.scale(0) == 0 and dose.scale(10) == 1000
    assert_close(dose.scale(1), 1000 * math.log1p(1 / .3) / math.log1p(10 / .3))


def test_numbers_are_shifted_scaled_and_clipped():
    row = Field("row", "number", "experiment").fit(["1", "16"])
    assert [row.scale(v) for v in (1, 16, 8.5, 99, -5)] == [0, 1000, 500, 1000, 0]


def test_categories_are_in_natural_order_and_unknown_ones_are_refused(fields):
    batch = fields[2]
    assert batch.vocabulary == ["B1", "B2", "B10"]
    with pytest.raises(FieldError, match="unknown batch B7: known are B1, B2, B10"):
        batch.encode(["B7"])
    assert natural("B10") > natural("B9") and natural("10") > natural("9")


def test_blank_is_unknown_and_not_zero(conditioner, fields):
    _, known, _ = conditioner.encode(ROWS, 4)
    assert known.tolist() == [[True] * 4] * 3 + [[False] * 4]
    zero = {"smiles": ["CCO"] * 2, "dose": ["0", ""], "row": ["1", ""]}
    vector, _, _ = embed(conditioner, zero)
    assert (vector[0] - vector[1]).abs().max() > 1e-2
    absent, _, _ = embed(conditioner, {"smiles": ["CCO"]})
    assert_close(absent[0], vector[1])  # a column not given is the same as a blank


@pytest.mark.parametrize("name, other", [("smiles", "CCN"), ("dose", "3"), ("batch", "B2"),
                                         ("row", "5")])
def test_every_field_changes_the_condition(conditioner, name, other):
    one = {k: v[:1] for k, v in ROWS.items()}
    before, tokens, _ = embed(conditioner, one)
    after, changed, _ = embed(conditioner, one | {name: [other]})
    assert (before - after).abs().max() > 1e-2
    if name == "smiles":
        assert (tokens - changed).abs().max() > 1e-2
    dropped = torch.tensor([[f.name != name for f in conditioner.fields]])
    without, _, _ = embed(conditioner, one, dropped)
    assert (before - without).abs().max() > 1e-2


def test_a_dropped_field_leaves_no_trace(conditioner):
    one, two = ({k: [v[i]] for k, v in ROWS.items()} for i in (0, 1))
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    a, _, mask_a = embed(conditioner, one, nothing)
    b, _, mask_b = embed(conditioner, two, nothing)
    assert_close(a, b)
    assert mask_a.tolist() == mask_b.tolist() == [[True] + [False] * Fingerprint.tokens]


def test_each_group_is_normalised_and_has_its_gain(conditioner):
    codes, known, molecules = conditioner.encode(ROWS, 4)
    with torch.no_grad():
        conditioner.gain.fill_(1.)
        before, _, _ = conditioner.parts(codes, known, molecules)
        conditioner.encoders[2].weight.mul_(1000)  # a group of huge embeddings drowns no other
        conditioner.null[2].mul_(1000)
        after, _, _ = conditioner.parts(codes, known, molecules)
        for group, part in after.items():
            assert_close(part.square().mean(1), torch.ones(4), atol=1e-3, rtol=0)
        assert_close(after["biology"], before["biology"])
        conditioner.gain[0].mul_(2)
        assert_close(conditioner.parts(codes, known, molecules)[0]["biology"],
                     2 * before["biology"])


def test_dropout_plan_has_the_shares_it_promises(fields):
    keep = draw_keep(fields, 200_000, torch.Generator().manual_seed(0), single=0.)
    biology, experiment = keep[:, 0], keep[:, 2]
    assert (keep[:, 0] == keep[:, 1]).all() and (keep[:, 2] == keep[:, 3]).all()
    for mask, share in ((biology & experiment, .7), (biology & ~experiment, .1),
                        (~biology & experiment, .1), (~biology & ~experiment, .1)):
        assert_close(mask.float().mean().item(), share, atol=.005, rtol=0)


def test_any_subset_of_fields_occurs(fields):
    keep = draw_keep(fields, 200_000, torch.Generator().manual_seed(0))
    full = keep.all(1).float().mean().item()
    assert_close(full, .7 * (.8 + .2 * .7 ** 4), atol=.005, rtol=0)
    assert len({tuple(k) for k in keep.tolist()}) == 16


def test_one_group_is_dropped_whole_in_a_tenth(fields):
    keep = draw_keep(fields[:2], 100_000, torch.Generator().manual_seed(0), single=0.)
    assert_close((~keep).all(1).float().mean().item(), .1, atol=.005, rtol=0)


def test_only_controls_are_shown_another_molecule(conditioner, fields):
    rows = {"smiles": ["CCO", "CS(C)=O"] * 500, "dose": ["1", "0"] * 500}
    codes, _, molecules = conditioner.encode(rows, 1000)
    keep = torch.ones(1000, 4, dtype=torch.bool)
    rng = torch.Generator().manual_seed(0)
    shown = hide_molecule_of_controls(fields, codes, keep, molecules, rng)
    changed = shown["smiles"] != codes["smiles"]
    assert not changed[::2].any()
    # half of the controls are redrawn, and half of the draws from two molecules hit the other
    assert_close(changed[1::2].float().mean().item(), .25, atol=.06, rtol=0)
    assert shown["dose"] is codes["dose"]
    keep[:, 1] = False  # where the dose is not shown, another molecule would be a lie
    same = hide_molecule_of_controls(fields, codes, keep, molecules, rng)
    assert torch.equal(same["smiles"], codes["smiles"])


def test_a_blank_dose_is_no_control(conditioner, fields):
    codes, known, molecules = conditioner.encode({"smiles": ["CCO", "CCN"] * 50}, 100)
    shown = hide_molecule_of_controls(fields, codes, known, molecules, torch.Generator())
    assert torch.equal(shown["smiles"], codes["smiles"])


def test_unseen_categories_become_unknown(conditioner, fields):
    columns = blank_unseen(fields, {"batch": ["B2", "B7", ""], "dose": ["1", "2", "3"]})
    assert columns == {"batch": ["B2", "", ""], "dose": ["1", "2", "3"]}


@pytest.mark.parametrize("name", ["type", "conc.um", "training", "a b"])
def test_a_column_may_have_any_name(name):
    field = parse_fields({"my.group": [name + ":category"]}, {name: ["x", "y"]})[0].fit(["x", "y"])
    vector, _, _ = embed(Conditioner([field], 16, 8), {name: ["x", "y"]})
    assert (vector[0] - vector[1]).abs().max() > 1e-3


@pytest.mark.parametrize("a, b", [("C[C@H](O)c1ccccc1", "C[C@@H](O)c1ccccc1"),
                                  ("OC(=O)c1ccccc1", "[O-]C(=O)c1ccccc1"), ("CCO", "CCN")])
def test_fingerprint_tells_enantiomers_and_charges(a, b):
    x, y = Fingerprint(Fingerprint.fit([], {}), 8, 8).featurise([a, b])
    assert (x - y).abs().max() > 0


def test_fingerprint_is_of_the_molecule_and_not_of_its_spelling():
    x, y, z = Fingerprint(Fingerprint.fit([], {}), 8, 8).featurise(["OCC", "C(O)C", "CCO |c:5|"])
    assert_close(x, y)
    assert_close(x, z)


def test_a_molecule_that_cannot_be_read_is_named(conditioner):
    with pytest.raises(FieldError, match="smiles=C1CC"):
        conditioner.encode({"smiles": ["C1CC"]}, 1)


def test_no_fields_at_all_still_condition_on_nothing():
    keep = draw_keep([], 2, torch.Generator())
    vector, tokens, mask = embed(Conditioner([], 8, 4), {"x": ["1", "2"]}, keep)
    assert vector.shape == (2, 8) and tokens.shape == (2, 1, 4) and mask.all()


def test_fields_of_a_group_act_together(conditioner):
    """A dose does nothing alone: the effect of a dose must be able to depend on the molecule. Sums
    of one part per field lie in a space of three dimensions, mixed ones do not."""
    rows = {"smiles": ["CCO", "CCO", "CCN", "CCN"], "dose": ["1", "10", "1", "10"]}
    codes, known, molecules = conditioner.encode(rows, 4)
    parts, _, _ = conditioner.parts(codes, known, molecules)
    spectrum = torch.linalg.svdvals(parts["biology"])
    assert spectrum[3] > 1e-2 * spectrum[0]


MOLECULES = ["CCO", "C[C@H](O)c1ccccc1", "C[C@@H](O)c1ccccc1", "OC(=O)c1ccccc1",
             "[O-]C(=O)c1ccccc1", "C/C=C/C", "C/C=C\\C", "CS(C)=O"]


def encoder(name, tmp_path, smiles=MOLECULES):
    np.savez(tmp_path / "table.npz", **{s: np.random.default_rng(i).normal(size=12)
                                        for i, s in enumerate(MOLECULES)})
    cls = MOLECULE_ENCODERS[name]
    settings = cls.fit(smiles, {"table": tmp_path / "table.npz"})
    return randomise(cls(json.loads(json.dumps(settings)), 16, 8)).eval()


@pytest.mark.parametrize("name", MOLECULE_ENCODERS)
def test_every_encoder_gives_a_vector_and_tokens(name, tmp_path):
    net = encoder(name, tmp_path)
    pooled, tokens, there = net(net.featurise(MOLECULES))
    assert pooled.shape == (8, 16) and tokens.shape[::2] == (8, 8)
    assert there.shape == tokens.shape[:2] and there.any(1).all() and there.dtype == torch.bool
    # what a molecule gives does not depend on the company it is in
    alone = net(net.featurise(MOLECULES[:1]))
    assert_close(alone[0][0], pooled[0], atol=1e-4, rtol=1e-4)
    assert_close(alone[1][0][alone[2][0]], tokens[0][there[0]], atol=1e-4, rtol=1e-4)


BLIND = {"descriptors": {"enantiomers", "double bond"}}


@pytest.mark.parametrize("name", MOLECULE_ENCODERS)
@pytest.mark.parametrize("what, i, j", [("enantiomers", 1, 2), ("charge", 3, 4),
                                        ("double bond", 5, 6)])
def test_which_encoders_tell_isomers_and_charges_apart(name, what, i, j, tmp_path):
    net = encoder(name, tmp_path)
    pooled, _, _ = net(net.featurise(MOLECULES))
    apart = (pooled[i] - pooled[j]).abs().max() > 1e-3
    expected = what not in BLIND.get(name, ())
    assert apart == expected


@pytest.mark.parametrize("name", MOLECULE_ENCODERS)
def test_encoders_see_the_molecule_and_not_its_spelling(name, tmp_path):
    net = encoder(name, tmp_path)
    spelt = ["OCC", "O[C@@H](C)c1ccccc1"]
    again, _, _ = net(net.featurise(spelt))
    pooled, _, _ = net(net.featurise([Chem.MolToSmiles(Chem.MolFromSmiles(s)) for s in spelt]))
    assert_close(again, pooled, atol=1e-4, rtol=1e-4)


def test_graph_does_not_depend_on_the_order_of_atoms(tmp_path):
    net = encoder("graph", tmp_path)
    molecule = Chem.MolFromSmiles("C[C@H](O)c1ccc(/C=C/C(=O)[O-])cc1")
    order = np.random.default_rng(0).permutation(molecule.GetNumAtoms()).tolist()
    shuffled = Chem.RenumberAtoms(molecule, order)
    graphs = [torch.from_numpy(np.concatenate([atoms + [1, 0, 0, 0, 0, 0], bonds], 1))[None]
              for atoms, bonds in map(read_graph, (molecule, shuffled))]
    (a, tokens_a, _), (b, tokens_b, _) = map(net, graphs)
    assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert_close(tokens_a[0, order], tokens_b[0], atol=1e-4, rtol=1e-4)


def test_graph_without_messages_is_a_bag_of_atoms(tmp_path):
    net = encoder("graph", tmp_path)
    meta, para = net(net.featurise(["Fc1cccc(F)c1", "Fc1ccc(F)cc1"]))[0]  # the same atoms
    assert (meta - para).abs().max() > 1e-3


def test_identity_knows_training_molecules_only(tmp_path):
    net = encoder("identity", tmp_path, MOLECULES[:2])
    pooled, _, _ = net(net.featurise(["CCO", MOLECULES[1], "CCCC", "CCCCC"]))
    assert_close(pooled[2], pooled[3])
    assert (pooled[0] - pooled[2]).abs().max() > 1e-3


def test_smiles_are_spelt_at_random_in_training_only(tmp_path):
    net = encoder("smiles", tmp_path)
    x = net.featurise(MOLECULES)
    assert_close(net(x)[0], net(x)[0])
    net.train()
    torch.manual_seed(0)
    assert (net(x)[0] - net(x)[0]).abs().max() > 1e-3


def test_a_table_takes_genes(tmp_path):
    genes = {"TP53": [1., 0], "MYC": [0., 1], "non targeting": [0., 0]}
    np.savez(tmp_path / "genes.npz", **genes)
    table, rows = MOLECULE_ENCODERS["table"], {"gene": ["MYC", "TP53", ""]}
    with pytest.raises(FieldError, match="MYC is no valid SMILES"):
        parse_fields({"biology": ["gene:molecule"]}, rows)
    fields = parse_fields({"biology": ["gene:molecule"]}, rows, table.is_molecule)
    settings = table.fit(["MYC", "TP53"], {"table": tmp_path / "genes.npz"})
    net = randomise(Conditioner(fields, 16, 8, "table", settings)).eval()
    codes, known, molecules = net.encode({"gene": ["TP53", "MYC", "non targeting"]}, 3)
    vector, _, _ = net(codes, known, molecules)
    assert (vector[0] - vector[1]).abs().max() > 1e-3  # and an unseen one is looked up
    with pytest.raises(FieldError, match="no vector for 1 molecules: KRAS"):
        net.encode({"gene": ["KRAS"]}, 1)


def test_table_names_what_it_lacks(tmp_path):
    net = encoder("table", tmp_path)
    with pytest.raises(FieldError, match="no vector for 1 molecules: CCCC"):
        net.featurise(["CCO", "CCCC"])
    with pytest.raises(FieldError, match="needs --molecule_table"):
        MOLECULE_ENCODERS["table"].fit(["C"], {})
    uneven = {m: np.zeros(12 + (m == "CCO")) for m in MOLECULES}
    np.savez(tmp_path / "y.npz", **uneven)
    with pytest.raises(FieldError, match="the vector of C.* is not"):
        MOLECULE_ENCODERS["table"].fit(MOLECULES, {"table": tmp_path / "y.npz"})
    (tmp_path / "table.npz").unlink()
    assert net.featurise(["OCC"]).shape == (1, 12)  # what training knew travels in the checkpoint
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    with pytest.raises(FieldError, match="x.npz is no table"):
        MOLECULE_ENCODERS["table"].fit(["C"], {"table": tmp_path / "x.npz"})


def test_descriptors_that_are_not_finite_become_the_mean(tmp_path, monkeypatch):
    net = encoder("descriptors", tmp_path)
    monkeypatch.setattr(conditioning, "calculate_descriptors",
                        lambda molecule: [math.nan, math.inf] + [1.] * (net.width() - 2))
    features = net.featurise(["CCO"])
    assert features[0, 0] == 0 and torch.isfinite(features).all()


@pytest.mark.parametrize("text", ["CCO.Cl", "Cl.OCC", "CCO |c:5|"])
def test_salts_and_tails_are_cut_off(text):
    assert Chem.MolToSmiles(parse_smiles(text)) == "CCO"


def test_the_demo_shows_that_a_dropped_field_leaves_no_trace(capsys):
    conditioning.show()
    rows = re.findall(r"^(CCO|dropped) +(10|dropped) +(B1|dropped) +([\d.]+) +(8.00|7.99) +"
                      r"(8.00|7.99) +[\d.]+ +(\d) +([\d.]+)$", capsys.readouterr().out, re.M)
    assert len(rows) == 8 and abs(sum(float(row[3]) for row in rows) - 1) < .005
    assert float(rows[0][3]) > .6 and "dropped" not in rows[0]  # everything is shown to most
    for smiles, dose, _, _, _, _, tokens, moved in rows:
        assert (float(moved) == 0) == (dose == "dropped")
        assert int(tokens) == (1 if smiles == "dropped" else 1 + Fingerprint.tokens)


def test_many_molecules_are_read_once_for_fitting_and_featurising(monkeypatch):
    pools = []

    class Pool(conditioning.ProcessPoolExecutor):
        def __init__(self, *given):
            pools.append(given)
            super().__init__(*given)
    monkeypatch.setattr(conditioning, "ProcessPoolExecutor", Pool)
    many, other = ["CCO", "CCN"] * 1000, ["CCO", "CCC"] * 1000
    encoder = MOLECULE_ENCODERS["descriptors"]
    settings = encoder.fit(many, {})
    features = encoder(settings, 8, 8).featurise(many)
    assert len(pools) == 1 and len(features) == 2000 and (features[0] != features[1]).any()
    encoder.fit(other, {})
    assert len(pools) == 2


def test_a_second_log_field_makes_no_control_of_a_treated_well():
    """Serum at 0 is no dose at 0: the molecule of a treated well stays."""
    wells = {"smiles": ["CCO", "CCN", "CCC"], "dose": ["10", "0", "5"], "serum": ["0", "1", "0"]}
    fields = [f.fit(wells[f.name]) for f in parse_fields(
        {"biology": ["smiles", "dose"], "experiment": ["serum:log"]}, wells)]
    codes = {"smiles": torch.arange(3).repeat(50), "dose": torch.tensor([10., 0., 5.]).repeat(50),
             "serum": torch.tensor([0., 1., 0.]).repeat(50)}
    keep = torch.ones(150, 3, dtype=torch.bool)
    shown = hide_molecule_of_controls(fields, codes, keep, {"smiles": ["CCO", "CCN", "CCC"]},
                                      torch.Generator().manual_seed(0))["smiles"].view(50, 3)
    assert (shown[:, 0] == 0).all() and (shown[:, 2] == 2).all()
    assert (shown[:, 1] != 1).any()
    assert [f.name for f in dose_fields(fields)] == ["dose"]


def test_what_is_a_dose():
    """A log field of the molecule's group, one named dose first, or one of that name anywhere."""
    def doses(**groups):
        return [f.name for f in dose_fields(parse_fields(groups, {
            name.partition(":")[0]: ["C" if name == "smiles" else "1"]
            for names in groups.values() for name in names}))]
    assert doses(biology=["smiles", "time_h:log", "dose"]) == ["dose"]
    assert doses(biology=["smiles", "dose_a", "dose_b"]) == ["dose_a", "dose_b"]
    assert doses(biology=["smiles", "amount:log"]) == ["amount"]
    assert doses(chemistry=["smiles"], amount=["dose"]) == ["dose"]
    assert doses(biology=["smiles"], experiment=["serum:log"]) == []


def test_salts_of_equal_parts_do_not_depend_on_their_order():
    a, b = "C[N+](C)(C)C", "CS(=O)(=O)[O-]"
    assert Chem.MolToSmiles(parse_smiles(f"{a}.{b}")) == Chem.MolToSmiles(parse_smiles(f"{b}.{a}"))


def test_outcomes_are_refused_under_other_spellings():
    for name in ("N_NUCLEI", "Metadata_n_nuclei", "True_effect"):
        with pytest.raises(FieldError, match="outcome"):
            parse_fields({"biology": [name]}, {name: ["1"]})


def test_a_column_that_is_blank_says_so():
    with pytest.raises(FieldError, match="note is blank"):
        parse_fields({"biology": ["note"]}, {"note": ["", ""]})


def test_a_control_has_every_dose_at_0():
    """Of two drugs given together one at 0 is a treatment."""
    wells = {"smiles": ["CCO", "CCN"], "dose_a": ["0", "0"], "dose_b": ["10", "0"]}
    fields = [f.fit(wells[f.name]) for f in parse_fields({"biology": list(wells)}, wells)]
    codes = {"smiles": torch.arange(2).repeat(50), "dose_a": torch.zeros(100),
             "dose_b": torch.tensor([10., 0.]).repeat(50)}
    shown = hide_molecule_of_controls(
        fields, codes, torch.ones(100, 3, dtype=torch.bool), {"smiles": wells["smiles"]},
        torch.Generator().manual_seed(0))["smiles"].view(50, 2)
    assert (shown[:, 0] == 0).all() and (shown[:, 1] != 1).any()
    assert train_ldm.untreated(SimpleNamespace(columns=wells), fields, range(2)) == [1]
