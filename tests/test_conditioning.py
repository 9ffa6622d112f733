"""Fields, learned nulls, the dropout plan, molecules."""
import math

import pytest
import torch
from torch.testing import assert_close

from conditioning import (Conditioner, Field, FieldError, Fingerprint, blank_unseen, draw_keep,
                          hide_molecule_of_controls, natural, parse_fields)
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
    x, y = Fingerprint.featurise([a, b])
    assert (x - y).abs().max() > 0


def test_fingerprint_is_of_the_molecule_and_not_of_its_spelling():
    x, y, z = Fingerprint.featurise(["OCC", "C(O)C", "CCO |c:5|"])
    assert_close(x, y)
    assert_close(x, z)


def test_a_molecule_that_cannot_be_read_is_named(conditioner):
    with pytest.raises(FieldError, match="smiles=C1CC"):
        conditioner.encode({"smiles": ["C1CC"]}, 1)


def test_no_fields_at_all_still_condition_on_nothing():
    keep = draw_keep([], 2, torch.Generator())
    vector, tokens, mask = embed(Conditioner([], 8, 4), {"x": ["1", "2"]}, keep)
    assert vector.shape == (2, 8) and tokens.shape == (2, 1, 4) and mask.all()
