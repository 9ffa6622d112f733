"""Fields, learned nulls, molecule encoders, the dropout plan."""
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from conditioning import (MOLECULE_ENCODERS, Conditioner, Field, FieldError, check_columns,
                          dose_fields, draw_keep, draw_spelling, hide_molecule_of_controls,
                          molecule_key, parse_fields)
from conftest import randomise

ROWS = {"smiles": ["CCO", "c1ccccc1O", "CS(C)=O", ""], "dose": ["1", "10", "0", ""],
        "batch": ["B1", "B10", "B2", ""], "row": ["1", "16", "8", ""]}
GROUPS = {"biology": ["smiles", "dose"], "experiment": ["batch", "row:number"]}


def fitted(groups, rows):
    return [f.fit(rows[f.name]) for f in parse_fields(groups, rows)]


@pytest.fixture
def conditioner():
    return randomise(Conditioner(fitted(GROUPS, ROWS), 32, 16))


def embed(conditioner, rows, keep=True):
    codes, known, molecules = conditioner.encode(rows, len(next(iter(rows.values()))))
    return conditioner(codes, known & keep, molecules)


@pytest.mark.parametrize("specification, values, says", [
    ("plate", ["24277"], "m.csv, column plate: write plate:c"), ("plat", None, "no column plat"),
    ("plate:colour", ["24277"], "write plate:category"), ("dose", ["-2"], "dose: -2"),
    ("smiles", ["CCO", "C1CC"], "m.csv, row 3, column smiles: C1CC"),
    ("age:number", ["1", "old"], "row 3, column age: old"), ("dose", ["inf"], "column dose: inf"),
    ("Metadata_n_nuclei", ["1"], "outcome"), ("batch:category", ["nan"], "column batch: nan")])
def test_faults_are_named(specification, values, says):
    columns = {"other": ["1"]} if values is None else {specification.partition(":")[0]: values}
    with pytest.raises(FieldError) as fault:
        parse_fields({"biology": [specification]}, columns, path="m.csv")
    assert says in str(fault.value) and "\n" not in str(fault.value)


def test_all_faults_are_reported_together_and_at_most_ten_rows_of_a_column():
    rows = {"smiles": ["C1CC", "???"] * 20, "dose": ["1"] * 40}
    with pytest.raises(FieldError, match="30 more(.|\n)*dose is given twice") as fault:
        parse_fields({"biology": ["smiles", "dose", "nothing"], "experiment": ["dose"]}, rows)
    assert len(str(fault.value).splitlines()) == 10 + 1 + 1 + 1
    check_columns(fitted(GROUPS, ROWS), ROWS | {"row": [""] * 4})  # unknown everywhere is no fault


def test_numbers_are_scaled_shifted_and_clipped_and_dose_0_is_legal():
    dose = Field("dose", "log", "biology").fit(["0", "0.3", "1", "10", ""])
    assert dose.low == .3 and [dose.scale(v) for v in (0, -1, 10, 99)] == [0, 0, 1000, 1000]
    assert_close(dose.scale(1), 1000 * math.log1p(1 / .3) / math.log1p(10 / .3))
    row = Field("row", "number", "experiment").fit(["1", "16"])
    assert [row.scale(v) for v in (1, 16, 8.5, 99, -5)] == [0, 1000, 500, 1000, 0]


def test_what_is_a_dose():
    def doses(*fields):
        return [f.name for f in dose_fields([Field(*text.split()) for text in fields])]
    smiles = "smiles molecule biology"
    assert doses(smiles, "time_h log biology", "dose log biology") == ["dose"]
    assert doses(smiles, "amount log biology") == ["amount"]
    assert doses(smiles, "conc_um log amount") == ["conc_um"]
    assert doses(smiles, "serum log experiment") == []


def test_blank_is_unknown_and_not_zero(conditioner):
    _, known, _ = conditioner.encode(ROWS, 4)
    assert known.tolist() == [[True] * 4] * 3 + [[False] * 4]
    vector, _, _ = embed(conditioner, {"smiles": ["CCO"] * 2, "dose": ["0", ""], "row": ["1", ""]})
    assert (vector[0] - vector[1]).abs().max() > 1e-2
    assert_close(embed(conditioner, {"smiles": ["CCO"]})[0][0], vector[1])  # no column: unknown


@pytest.mark.parametrize("i, other", [(0, "CCN"), (1, "3"), (2, "B2"), (3, "5")])
def test_every_field_changes_the_condition_and_leaves_no_trace_when_dropped(conditioner, i, other):
    one = {k: v[:1] for k, v in ROWS.items()}
    two, keep = one | {list(ROWS)[i]: [other]}, torch.arange(4) != i
    (before, tokens, _), (after, changed, _) = embed(conditioner, one), embed(conditioner, two)
    assert (before - after).abs().max() > 1e-2
    assert ((tokens - changed).abs().max() > 1e-2) == (i == 0)
    (without, _, mask), (same, _, _) = (embed(conditioner, rows, keep) for rows in (one, two))
    assert (before - without).abs().max() > 1e-2
    assert_close(without, same)
    assert mask.tolist() == [[True] + [i != 0] * 4]  # one null token stays


def test_each_group_is_normalised_and_its_fields_act_together(conditioner):
    def part(rows, group):
        """What one group adds to the vector: the gain of the other is 0."""
        conditioner.gain.data[:] = torch.tensor([[g == group] for g in conditioner.groups])
        return (embed(conditioner, rows)[0] - conditioner.empty).detach()
    conditioner.null.data[2] *= 1000  # a group of huge embeddings drowns no other
    for group in conditioner.groups:
        assert_close(part(ROWS, group).square().mean(1), torch.ones(4), atol=1e-3, rtol=0)
    # sums of one part per field would lie in three dimensions, mixed ones do not
    crossed = {"smiles": ["CCO", "CCO", "CCN", "CCN"], "dose": ["1", "10", "1", "10"]}
    spectrum = torch.linalg.svdvals(part(crossed, "biology"))
    assert spectrum[3] > 1e-2 * spectrum[0]


def test_columns_may_have_any_name():
    rows = {name: ["x", "y"] for name in ("type", "conc.um", "training", "a b")}
    fields = fitted({"my.group": [f"{name}:category" for name in rows]}, rows)
    assert embed(Conditioner(fields, 16, 8), rows)[0].diff(dim=0).abs().max() > 1e-3


def test_dropout_plan_has_the_shares_it_promises():
    fields, rng = fitted(GROUPS, ROWS), torch.Generator().manual_seed(0)
    keep = draw_keep(fields, 200_000, rng, single=0.)
    biology, experiment = keep[:, 0], keep[:, 2]
    assert (keep[:, 0] == keep[:, 1]).all() and (keep[:, 2] == keep[:, 3]).all()
    one_group, any_subset = draw_keep(fields[:2], 200_000, rng, 0.), draw_keep(fields, 200_000, rng)
    for mask, share in ((biology & experiment, .7), (biology & ~experiment, .1),
                        (~biology & experiment, .1), (~biology & ~experiment, .1),
                        (~one_group.any(1), .1), (any_subset.all(1), .7 * (.8 + .2 * .7 ** 4))):
        assert_close(mask.float().mean().item(), share, atol=.005, rtol=0)
    assert len(any_subset.unique(dim=0)) == 16


def test_only_those_shown_all_doses_at_0_get_another_molecule():
    wells = {"smiles": ["CCO", "CCN", "CCC", "CCF"], "dose": ["10", "0", "", "0"],
             "serum": ["0", "1", "0", "0"]}
    fields = fitted({"biology": ["smiles", "dose"], "experiment": ["serum:log"]}, wells)
    codes, keep, molecules = Conditioner(fields, 8, 4).encode(
        {k: v * 500 for k, v in wells.items()}, 2000)
    keep[3::4, 1] = False  # the dose of the last is not shown
    shown = hide_molecule_of_controls(fields, codes, keep, molecules, torch.Generator())
    changed = (shown["smiles"] != codes["smiles"]).float().view(500, 4).mean(0)
    assert_close(changed, torch.tensor([0., .5 * .75, 0., 0.]), atol=.06, rtol=0)


MOLECULES = ["CCO", "C[C@H](O)c1ccccc1", "C[C@@H](O)c1ccccc1", "OC(=O)c1ccccc1",
             "[O-]C(=O)c1ccccc1", "CCCCCCC/C=C/C", "CCCCCCC/C=C\\C", "Fc1cccc(F)c1", "Fc1ccc(F)cc1"]


@pytest.mark.parametrize("name", MOLECULE_ENCODERS)
def test_encoders_see_the_molecule_and_neither_its_spelling_nor_its_company(name, tmp_path):
    np.savez(tmp_path / "table.npz", **dict(zip(MOLECULES, np.random.rand(len(MOLECULES), 12))))
    settings = MOLECULE_ENCODERS[name].fit(MOLECULES, {"table": tmp_path / "table.npz"})
    net = randomise(MOLECULE_ENCODERS[name](json.loads(json.dumps(settings)), 16, 8))
    pooled, tokens, there = net(net.featurise(MOLECULES)[::net.spellings])
    assert pooled.shape == (9, 16) and tokens.shape[::2] == (9, 8) and there.any(1).all()
    again, others, here = net(net.featurise(["O[C@H](C)c1ccccc1"])[::net.spellings])
    assert_close(again[0], pooled[2], atol=1e-4, rtol=1e-4)
    in_any_order = (t.sort(0).values for t in (others[0][here[0]], tokens[2][there[2]]))
    assert_close(*in_any_order, atol=1e-4, rtol=1e-4)
    alike = [(i, j) for i, j in ((1, 2), (3, 4), (5, 6), (7, 8))
             if (pooled[i] - pooled[j]).abs().max() < 1e-3]
    assert alike == ([(1, 2), (5, 6)] if name == "descriptors" else [])  # handedness, E and Z
    if name == "identity":  # all that training never saw are one
        assert not net.featurise(["CCCC", "CCCCC"]).any() and net.featurise(["OCC"]) > 0


def test_a_spelling_is_drawn_with_the_batch_and_forward_has_no_randomness(capsys):
    rows, encoders = {"smiles": ["CCO", "C[C@H](O)c1ccccc1"] * 50}, MOLECULE_ENCODERS["smiles"]
    fields = fitted({"biology": ["smiles"]}, rows)
    net = randomise(Conditioner(fields, 16, 8, "smiles", encoders.fit(rows["smiles"][:2], {})))
    codes, known, molecules = net.encode(rows, 100)
    drawn = draw_spelling(fields, codes, encoders, torch.Generator().manual_seed(0))
    assert len(drawn["smiles"].unique()) == len(molecules["smiles"]) == 16
    assert torch.equal(drawn["smiles"] // 8 * 8, codes["smiles"])
    assert torch.equal(net.train()(drawn, known, molecules)[0], net(drawn, known, molecules)[0])
    assert (net(drawn, known, molecules)[0] - net(codes, known, molecules)[0]).abs().max() > 1e-3
    net.encode({"smiles": ["CC(N)C(=O)" * 12 + "O", "CCO"]}, 2)  # a peptide
    assert "1 of 2 SMILES are read no further than 96 tokens" in capsys.readouterr().out


def test_a_table_takes_genes_and_names_what_it_lacks(tmp_path):
    table, path, rows = MOLECULE_ENCODERS["table"], tmp_path / "t.npz", {"gene": ["MYC", "TP53"]}
    np.savez(path, TP53=[1., 0], MYC=[0., np.nan], **{"non targeting": [0., 0]})
    fields = parse_fields({"biology": ["gene:molecule"]}, rows, table.is_molecule)
    net = randomise(Conditioner(fields, 16, 8, "table", table.fit(rows["gene"], {"table": path})))
    vector, _, _ = embed(net, {"gene": ["TP53", "MYC", "non targeting"]})  # the last from the file
    assert torch.isfinite(vector).all() and (vector[0] - vector[1]).abs().max() > 1e-3
    np.savez(path, long=np.zeros(3), TP53=[5., 5])
    assert_close(embed(net, {"gene": ["TP53", "MYC"]})[0], vector[:2])  # as training knew them
    for gene, says in (("KRAS", "nothing for 1 molecules, such as KRAS"), ("long", "same shape")):
        with pytest.raises(FieldError, match=says):
            net.encode({"gene": [gene]}, 1)
    path.write_bytes(b"nonsense")
    embed(net, rows)  # what training knew travels in the checkpoint
    for options in {}, {"table": path}:
        with pytest.raises(FieldError, match="--molecule_table .*wanted: an .npz"):
            table.fit(["TP53"], options)


def test_molecules_are_read_without_salts_and_tails():
    a, b = "C[N+](C)(C)C", "CS(=O)(=O)[O-]"  # two parts as large
    assert len(set(map(molecule_key, ("CCO", "CCO.Cl", "Cl.OCC", "CCO |c:5|")))) == 1
    assert molecule_key(f"{a}.{b}") == molecule_key(f"{b}.{a}")
