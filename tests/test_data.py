"""The simulated microscope against its own written effects; manifests, readers, crops, splits."""
import csv
import io
import pickle
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose
from PIL import Image
from rdkit import Chem

import data
from conftest import SHARED
from data import DataError, Manifest, Pixels, read_manifest, split_rows, take_view

ROW = dict(row=5, column=5, site=1, batch="B1", plate="P01", true_mechanism="none", true_effect=0.)
SCREEN = data.Screen()
OPTICS = data.microscope(SCREEN)


def fields_of(n=24, **changes):
    return [data.draw_field(ROW | changes, SCREEN, OPTICS, [5, i]) for i in range(n)]


def mean_channel(fields, channel):
    return np.mean([f["image"][data.CHANNELS.index(channel)] for f in fields])


# --- the simulated screen -------------------------------------------------------------------------

def test_molecules_are_valid_distinct_and_carry_their_motif():
    found = data.molecules()
    assert len({m["smiles"] for m in found}) == len(found) == 320
    for m in found:
        motif = Chem.MolFromSmarts(data.MECHANISMS[m["mechanism"]]["motif"].lstrip("/"))
        assert Chem.MolFromSmiles(m["smiles"]).HasSubstructMatch(motif), m
    scaffolds = {m["mechanism"]: set() for m in found}
    for m in found:
        if m["kind"] == "train":
            scaffolds[m["mechanism"]].add(m["scaffold"])
    assert all(len(s) == 3 for s in scaffolds.values())


def test_activity_cliffs_are_enantiomers_and_charges():
    ec50 = {m["smiles"]: m["ec50"] for m in data.molecules()}
    pairs = [(data.canonical(f"{r}c1ccc(B(O)O)cc1"), data.canonical(f"{s}c1ccc(B(O)O)cc1"))
             for r, s in (("C[C@H](O)", "C[C@@H](O)"), ("OC(=O)", "[O-]C(=O)"))]
    assert all(ec50[b] / ec50[a] >= 8 for a, b in pairs)


@pytest.mark.parametrize("confounding", [0., .5, .9, 1.])
def test_confounding_is_the_share_at_home(confounding):
    rows = data.layout(replace(SCREEN, confounding=confounding))
    treated = [r for r in rows if r["role"] == "treated" and r["site"] == 1]
    home = np.mean([r["batch"] == f"B{data.home_batch(r['true_mechanism'], 6) + 1}"
                    for r in treated])
    assert abs(home - (confounding + (1 - confounding) / 6)) < .03
    controls = Counter(r["plate"] for r in rows if r["role"] == "control")
    assert len(controls) == 12 and set(controls.values()) == {24 * 4}


@pytest.mark.parametrize("confounding", [0., .9])
def test_held_out_pairs_and_molecules_never_reach_training(confounding):
    rows = data.layout(replace(SCREEN, confounding=confounding))
    train = [r for r in rows if r["split"] in ("train", "val")]
    for kind in ("val", "test"):
        pairs = data.heldout_pairs(6, kind)
        assert not [r for r in train if pairs.get(r["true_mechanism"]) == int(r["batch"][1:]) - 1]
        assert all(b != data.home_batch(m, 6) for m, b in pairs.items())
    for batches in range(2, 9):  # home is never held out
        assert all(b != data.home_batch(m, batches) for kind in ("val", "test")
                   for m, b in data.heldout_pairs(batches, kind).items())
    kind = {m["smiles"]: m["kind"] for m in data.molecules()}
    assert {kind[r["smiles"]] for r in rows if r["split"].endswith("pair")} == {"train"}
    assert {kind[r["smiles"]] for r in train if r["role"] == "treated"} == {"train"}
    by_well = {}
    for r in rows:
        by_well.setdefault((r["plate"], r["well"]), set()).add(r["split"])
    assert all(len(s) == 1 for s in by_well.values())  # the sites of a well stay together


def test_dose_response_is_the_hill_curve():
    for r in data.layout(replace(SCREEN, sites=1))[::97]:
        expected = 1 / (1 + (r["true_ec50"] / r["dose"]) ** 1.5) if r["dose"] else 0.
        assert_allclose(r["true_effect"], expected, atol=1e-3)


def test_without_effect_the_cells_are_the_untreated_ones():
    for field in fields_of(4):
        assert_allclose(field["image"], field["untreated"])
    treated = fields_of(4, true_mechanism="golgi", true_effect=.9)
    for a, b in zip(treated, fields_of(4)):
        assert_allclose(a["untreated"], b["image"])  # the same cells, before
        assert (a["image"] != a["untreated"]).mean() > .05


@pytest.mark.parametrize("mechanism, measure, sign", [
    ("dna_damage", "nucleus_radius", 1), ("apoptosis", "nuclei", -1),
    ("tubulin", "binucleation", 1), ("mitochondria", "Mito", -1), ("er_stress", "RNA", 1),
    ("actin", "AGP", -1),
    ("nucleolar", "RNA", -1), ("golgi", "AGP", 1)])
def test_each_mechanism_does_what_it_says(mechanism, measure, sign):
    before, after = fields_of(), fields_of(true_mechanism=mechanism, true_effect=.9)
    if measure in data.CHANNELS:
        a, b = (mean_channel(f, measure) for f in (before, after))
    else:
        a, b = (np.mean([f["truth"][f"true_{measure}"] for f in fs]) for fs in (before, after))
    assert sign * (b / a - 1) > .03, (a, b)


def test_batches_differ_in_gain_and_plates_a_little():
    batch = [mean_channel(fields_of(8, batch=f"B{b}", plate=f"P{2 * b - 1:02d}"), "ER")
             for b in range(1, 7)]
    plate = [mean_channel(fields_of(8, plate=p), "ER") for p in ("P01", "P02")]
    assert np.std(np.log(batch)) > 2 * np.std(np.log(plate)) > 0


def test_edge_wells_have_fewer_cells_and_sites_other_light():
    inner, edge = (np.mean([f["truth"]["true_nuclei"] for row in (r, r + 1) for f in fields_of(
        16, row=row, column=1 if r == 20 else 9)]) for r in (4, 20))
    assert edge < .9 * inner
    left, right = (np.mean([f["image"][1] for f in fields_of(16, site=s)], 0) for s in (1, 2))
    assert (left[:, :20].mean() - left[:, -20:].mean()) > (right[:, :20].mean()
                                                           - right[:, -20:].mean())


def test_a_screen_is_drawn_from_its_seed():
    a, b = (data.draw_field(ROW, SCREEN, OPTICS, [1, 2]) for _ in range(2))
    assert_allclose(a["image"], b["image"])
    other = data.microscope(replace(SCREEN, seed=1))
    assert abs(other[0]["B1"]["gain"] - OPTICS[0]["B1"]["gain"]).max() > .05
    assert_allclose(data.microscope(replace(SCREEN, draw=9))[0]["B1"]["gain"],
                    OPTICS[0]["B1"]["gain"])


def test_written_screen_is_a_manifest_like_any_other(screen, screen_settings):
    manifest = read_manifest(screen)
    rows = data.layout(screen_settings)
    assert len(manifest) == len(rows) and manifest.columns["smiles"][5] == rows[5]["smiles"]
    drawn = data.draw_field(rows[70], screen_settings, data.microscope(screen_settings),
                            [screen_settings.seed, screen_settings.draw, 4, 70])
    assert_allclose(Pixels(manifest)[70], drawn["image"])
    for column, key in (("untreated", "untreated"), ("brightfield", "brightfield")):
        counterpart = read_manifest(screen, ("any",), column)
        assert_allclose(Pixels(counterpart)[70], drawn[key])


def test_the_demo_draws_the_cells_of_each_mechanism(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "picture", lambda path, rows, *labels: drawn.append((rows, labels)))
    data.draw_mechanisms(tmp_path / "mechanisms.png")
    rows, (channels, mechanisms, *_) = drawn[0]
    assert mechanisms == ["none", *data.MECHANISMS] and len(rows) == 9
    assert all(len(row) == 1 + len(channels) + 1 for row in rows)
    for row in rows[1:]:  # each acts, and on the same cells
        assert .005 < np.abs(row[0] - rows[0][0]).mean() < .5


# --- readers --------------------------------------------------------------------------------------

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 12, 10))


def write_manifest(folder, rows):
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "m.csv"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["tif", "tif_last", "npy", "npy_last", "npz", "stack", "per_tif",
                                  "per_png"])
def test_every_format_gives_the_same_pixels(tmp_path, kind, dtype):
    image = (IMAGE * (200 if dtype == np.uint16 else 1)).astype(dtype)
    row = {"image": "a.npy"}
    if kind.startswith("tif"):
        row = {"image": "a.tif"}
        tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(image, 0, -1) if "last" in kind else image,
                         photometric="minisblack")
    elif kind == "npz":  # channels last and a pickle beside it, as Hofmarcher et al. 2019 publish
        row = {"image": "a.npz"}
        np.savez(tmp_path / "a.npz", sample=np.moveaxis(image, 0, -1),
                 other=np.array([{"a": 1}], dtype=object))
    elif kind == "stack":
        np.save(tmp_path / "a.npy", np.stack([image * 0, image]))
        row["index"] = 1
    elif kind.startswith("per"):
        suffix = kind[4:]
        row = {c: f"{c}.{suffix}" for c in data.CHANNELS}
        for c, plane in zip(data.CHANNELS, image):
            if suffix == "tif":
                tifffile.imwrite(tmp_path / f"{c}.tif", plane)
            else:
                Image.fromarray(plane).save(tmp_path / f"{c}.png")
    else:
        np.save(tmp_path / "a.npy", np.moveaxis(image, 0, -1) if "last" in kind else image)
    pixels = Pixels(read_manifest(write_manifest(tmp_path, [row])))
    assert pixels[0].dtype == np.float32
    assert_allclose(pixels[0], image)
    assert pixels.dtype_range(0) == np.iinfo(dtype).max


def test_other_stains_by_name(tmp_path):
    np.save(tmp_path / "a.npy", IMAGE[:3].astype(np.uint8))
    names = ("Actin", "DNA", "Tub")
    manifest = read_manifest(write_manifest(tmp_path, [{"image": "a.npy"}]), names)
    assert manifest.channels == names and Pixels(manifest)[0].shape[0] == 3


def test_binning_is_the_mean_of_squares(tmp_path):
    np.save(tmp_path / "a.npy", IMAGE[:, :11].astype(np.uint8))
    pixels = Pixels(read_manifest(write_manifest(tmp_path, [{"image": "a.npy"}])), binning=2)
    assert pixels[0].shape == (5, 5, 5)
    assert_allclose(pixels[0][3, 4, 2], IMAGE[3, 8:10, 4:6].mean())


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return {"image": name}


def tiff_bytes():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, IMAGE.astype(np.uint16))
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("name, content, says", [
    ("gone.tif", None, "no image file"),
    ("cut.tif", lambda: tiff_bytes()[:-300], "cut.tif"),
    ("head.tif", lambda: tiff_bytes()[:40], "head.tif"),
    ("noise.tif", lambda: bytes(range(256)) * 9, "noise.tif"),
    ("empty.tif", lambda: b"", "empty.tif"),
    ("noise.png", lambda: bytes(range(256)) * 9, "noise.png"),
    ("noise.npy", lambda: bytes(range(256)) * 9, "noise.npy"),
    ("noise.npz", lambda: bytes(range(256)) * 9, "noise.npz"),
    ("pointer.tif", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
    ("bomb.npy", lambda: pickle.dumps(Bomb()), "bomb.npy"),
    ("photo.jpg", lambda: b"\xff\xd8\xff", "no image format read")])
def test_a_bad_file_is_one_line_with_its_name_and_row(tmp_path, name, content, says):
    np.save(tmp_path / "good.npy", IMAGE.astype(np.uint8))
    row = {"image": name} if content is None else broken(tmp_path, name, content())
    path = write_manifest(tmp_path, [{"image": "good.npy"}, row])
    with pytest.raises(DataError) as fault:
        read_manifest(path)
    lines = str(fault.value).splitlines()
    assert len(lines) == 1 and "row 3" in lines[0] and name in lines[0] and says in lines[0]


def test_a_truncated_png_and_npz_are_found_without_decoding(tmp_path):
    Image.fromarray(IMAGE[0].astype(np.uint8)).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", sample=IMAGE.astype(np.uint8))
    for name in ("a.png", "a.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:len(whole) * 2 // 3])
        with pytest.raises(DataError, match=name):
            data.read_header(tmp_path / name)


def test_a_pickled_array_in_an_npz_is_never_loaded(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("sample.npy", pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="a.npz"):
        read_manifest(write_manifest(tmp_path, [{"image": "a.npz"}]))


def test_all_faults_are_listed(tmp_path):
    path = write_manifest(tmp_path, [{"image": f"{i}.tif"} for i in range(25)])
    with pytest.raises(DataError) as fault:
        read_manifest(path)
    assert len(str(fault.value).splitlines()) == 21 and "and 5 more" in str(fault.value)


@pytest.mark.parametrize("content, says", [
    (None, "no manifest"), ("image\n", "no rows"), ("", "no rows"),
    ("image,a\nx.npy\n", "row 2: 1 values for 2 columns"), ("picture\nx.npy\n", "no column image"),
    ("DNA,ER,RNA,AGP\na,b,c,d\n", "no column Mito"), (b"\xff\xfe\x00\x01", "no CSV")])
def test_a_bad_manifest_is_refused(tmp_path, content, says):
    path = tmp_path / "m.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        read_manifest(path)


def test_wrong_number_of_channels_and_bad_index(tmp_path):
    np.save(tmp_path / "a.npy", IMAGE[:4].astype(np.uint8))
    with pytest.raises(DataError, match="4 channels, 5 expected"):
        read_manifest(write_manifest(tmp_path, [{"image": "a.npy"}]))
    np.save(tmp_path / "b.npy", IMAGE[None].astype(np.uint8))
    with pytest.raises(DataError, match="row 2, column index: 1.0"):
        read_manifest(write_manifest(tmp_path, [{"image": "b.npy", "index": "1.0"}]))
    with pytest.raises(DataError, match="index 3 is beyond"):
        read_manifest(write_manifest(tmp_path, [{"image": "b.npy", "index": 3}]))
    np.save(tmp_path / "c.npy", IMAGE.astype(np.float64))
    with pytest.raises(DataError, match="float64"):
        read_manifest(write_manifest(tmp_path, [{"image": "c.npy"}]))


# --- intensities, views, splits -------------------------------------------------------------------

def stack_manifest(tmp_path, stack, **columns):
    np.save(tmp_path / "s.npy", stack)
    rows = [{"image": "s.npy", "index": i, **{k: v[i] for k, v in columns.items()}}
            for i in range(len(stack))]
    return read_manifest(write_manifest(tmp_path, rows))


def test_intensity_rules(tmp_path):
    ramp = np.arange(4000, dtype=np.uint16).reshape(1, 40, 100)
    stack = np.concatenate([ramp, 2 * ramp, 3 * ramp, ramp, ramp])[None]
    pixels = Pixels(stack_manifest(tmp_path, stack))
    assert data.fit_intensity("dtype", pixels, [0])["high"] == [65535] * 5
    assert data.fit_intensity("0:4095", pixels, [0])["high"] == [4095] * 5
    fitted = data.fit_intensity("percentile", pixels, [0])
    assert_allclose(fitted["high"][1], 2 * 3995, rtol=.01)
    scaled = data.scale_intensity(pixels[0], fitted)
    assert scaled.min() == -1 and scaled.max() == 1
    assert_allclose(scaled[0].mean(), 0, atol=.01)
    with pytest.raises(DataError, match="percentile, dtype, or a range"):
        data.fit_intensity("bright", pixels, [0])


def test_a_channel_without_contrast_is_named(tmp_path):
    stack = np.zeros((1, 5, 8, 8), np.uint8)
    stack[:, :4] = np.arange(64).reshape(8, 8)
    with pytest.raises(DataError, match="channel Mito has no contrast"):
        data.fit_intensity("percentile", Pixels(stack_manifest(tmp_path, stack)), [0])


def test_views_are_crops_in_all_eight_orientations():
    image = np.arange(2 * 9 * 9, dtype=np.float32).reshape(2, 9, 9)
    rng = np.random.default_rng(0)
    whole = {take_view(image, 0, rng).tobytes() for _ in range(200)}
    assert len(whole) == 8
    assert {take_view(image, 0, rng, flips=False).tobytes() for _ in range(9)} == {image.tobytes()}
    corners = {tuple(take_view(image, 4, rng, flips=False)[0, 0, :1]) for _ in range(600)}
    assert len(corners) == 36
    assert_allclose(take_view(image, 5), image[:, 2:7, 2:7])
    with pytest.raises(DataError, match="smaller than the crop"):
        take_view(image, 10)


def bare(**columns):
    n = len(next(iter(columns.values())))
    return Manifest("m.csv", columns, ("DNA",), [("x",)] * n, [None] * n, {})


def test_split_keeps_groups_together():
    plates = [f"P{i % 10}" for i in range(200)]
    train, held = split_rows(bare(plate=plates), "plate", .2)
    assert len(train) == 160 and len(held) == 40
    assert not {plates[i] for i in train} & {plates[i] for i in held}
    again, _ = split_rows(bare(plate=plates + plates), "plate", .2)
    assert set(train) <= set(again)  # more rows of known plates move no plate across


def test_split_by_molecule_sees_through_spelling():
    # one molecule in two spellings stays on one side of the split
    pairs = [("OCC", "C(O)C"), ("c1ccccc1O", "Oc1ccccc1"), ("CCN", "NCC"), ("CCCl", "ClCC")]
    smiles = [s for pair in pairs for s in pair]
    for seed in range(5):
        train, held = split_rows(bare(smiles=smiles), "smiles", .5, seed)
        assert len(train) == len(held) == 4 and {i // 2 for i in train}.isdisjoint(
            {i // 2 for i in held})


def test_split_by_two_columns_and_by_value():
    columns = dict(drug=["a", "a", "b", "b"] * 5, plate=["1", "2"] * 10)
    train, held = split_rows(bare(**columns), "drug+plate=b+2")
    assert list(held) == list(range(3, 20, 4)) and len(train) == 15
    _, held = split_rows(bare(**columns), "drug+plate", .25)
    assert len(held) == 5 and len({(columns["drug"][i], columns["plate"][i]) for i in held}) == 1
    _, held = split_rows(bare(smiles=["CCO", "OCC", "CCN"]), "smiles=C(O)C")
    assert list(held) == [0, 1]
    with pytest.raises(DataError, match="no column dose"):
        split_rows(bare(**columns), "dose")
    with pytest.raises(DataError, match="no row has it"):
        split_rows(bare(**columns), "plate=9")


def test_split_column_is_used_where_there_is_one():
    train, held = split_rows(bare(split=["train", "val", "test_pair", "train"]))
    assert list(train) == [0, 3] and list(held) == [1]
    with pytest.raises(DataError, match="train and val"):
        split_rows(bare(split=["training", "val"]))


def test_show_prints_counts_and_draws(screen, tmp_path, cli):
    status, out, _ = cli(data, "show", screen, "--out", tmp_path / "sheet.png")
    assert status == 0 and "images, channels DNA" in out and "control (96)" in out
    images = np.load(screen.parent / "image.npy")
    assert f"{len(images)} images of {images.shape[3]} x {images.shape[2]} pixels\n" in out
    assert f"DNA {images[:, 0].min()} to {images[:, 0].max()}, ER" in out
    assert f"Mito {images[:, 4].min()} to {images[:, 4].max()}\n" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_show_and_simulate_refuse_in_one_line(tmp_path, screen, refused):
    before = screen.read_bytes()
    for words, says in ((["show", tmp_path / "none.csv"], "no manifest at"),
                        (["simulate", "--out", screen.parent], "exists"),
                        (["simulate", "--molecules", "3"], "unrecognized")):
        assert len(refused(data, *words, says=[says])) == 1
    assert screen.read_bytes() == before  # nothing was written over


# --- real plates ----------------------------------------------------------------------------------

real = pytest.mark.skipif(not SHARED.exists(), reason="no real plates beside this checkout")


@real
def test_lincs_index_is_a_manifest_as_it_stands():
    manifest = read_manifest(SHARED / "lincs" / "index.csv")
    assert len(manifest) == 54 and manifest.sizes == {(1080, 1080): "row 2"}
    pixels = Pixels(manifest, binning=2)
    assert pixels[3].shape == (5, 540, 540) and 0 < pixels[3].mean() < 255


@real
def test_bray_and_phenix_tiffs(tmp_path):
    bray = {c: str(SHARED / "bray2017" / f) for c, f in zip(data.CHANNELS, (
        "Hoechst.tif", "ERSyto.tif", "ERSytoBleed.tif", "Ph_golgi.tif", "Mito.tif"))}
    phenix = {c: str(SHARED / "phenix_brightfield" / f"r03c03f03p01-ch{k}sk1fk1fl1.tiff")
              for c, k in zip(data.CHANNELS, (5, 2, 6, 3, 4))}
    manifest = read_manifest(write_manifest(tmp_path, [bray, phenix]))
    assert set(manifest.sizes) == {(520, 696), (1080, 1080)}
    assert Pixels(manifest)[0].max() < 4096 < 65535 == Pixels(manifest).dtype_range(0)


# --- faults that an audit found -------------------------------------------------------------------

@pytest.mark.parametrize("text, channels, says", [
    ("image,smiles\na.npy,C\n\na.npy,C\n", data.CHANNELS, "row 3 is empty"),
    ("image,dose,dose\na.npy,1,2\n", data.CHANNELS, "more than one column dose"),
    ("DNA,ER\na.npy,a.npy\n", ("DNA", "ER", "DNA"), "channel DNA is named twice")])
def test_tables_that_could_be_read_in_two_ways_are_refused(tmp_path, text, channels, says):
    """Rows keep the numbers of a spreadsheet, and a name stands for one column."""
    np.save(tmp_path / "a.npy", IMAGE.astype(np.uint8))
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_manifest(tmp_path / "m.csv", channels)


def test_empty_lines_at_the_end_and_columns_without_a_name_are_no_fault(tmp_path):
    np.save(tmp_path / "a.npy", IMAGE.astype(np.uint8))
    (tmp_path / "m.csv").write_text("image,,\na.npy,1,2\n\n\n")
    assert len(read_manifest(tmp_path / "m.csv")) == 1


def test_own_stains_have_colours_of_their_own():
    assert_allclose(data.colours_of(("R", "G", "B")).argmax(1), [0, 1, 2])
    many = data.colours_of(["DNA", *"abcdefgh"])
    assert len({tuple(c) for c in many}) == 9


def test_every_bad_place_in_a_stack_is_named(tmp_path):
    np.save(tmp_path / "a.npy", IMAGE[None].astype(np.uint8))
    with pytest.raises(DataError, match="(?s)row 2, column index: x .*row 4, column index: ²"):
        read_manifest(write_manifest(tmp_path, [{"image": "a.npy", "index": i}
                                                for i in ("x", 0, "²")]))


def test_images_beyond_the_check_are_checked_when_they_are_read(tmp_path):
    """Of more files than are opened at first the wrong ones are corrupt, not silently read."""
    for name, image in (("a", IMAGE.astype(np.uint8)), ("b", IMAGE.astype(np.float32)),
                        ("c", IMAGE[:4].astype(np.uint8))):
        np.save(tmp_path / f"{name}.npy", image)
    manifest = read_manifest(write_manifest(tmp_path, [{"image": f"{n}.npy"} for n in "abc"]),
                             check=2)
    pixels = Pixels(manifest, max_corrupt=1.)
    found = list(pixels.many(range(3)))
    assert found[0] is not None and found[1] is found[2] is None
    assert "row 3, column image" in pixels.corrupt[1] and "float32" in pixels.corrupt[1]
    assert "row 4, column image" in pixels.corrupt[2] and "4 channels" in pixels.corrupt[2]


def test_what_is_opened_at_once_counts_images_not_files(tmp_path):
    """Two channels a row: a limit of two images opens all four files."""
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", IMAGE[0].astype(np.uint8))
    rows = [{"DNA": "a.npy", "ER": "b.npy"}, {"DNA": "c.npy", "ER": "gone.npy"}]
    with pytest.raises(DataError, match="row 3, column ER: no image file"):
        read_manifest(write_manifest(tmp_path, rows), ("DNA", "ER"), check=2)


def test_big_endian_images_are_read(tmp_path):
    np.save(tmp_path / "a.npy", IMAGE.astype(">u2"))
    pixels = Pixels(read_manifest(write_manifest(tmp_path, [{"image": "a.npy"}])))
    assert_allclose(pixels[0], IMAGE)


def test_a_salt_is_held_out_with_its_base():
    spelt = ["CC[NH3+].[Cl-]", "CCN", "Cl.NCC", "CCO", "CCCO", "CCCCO", "c1ccccc1", "CC(C)O"]
    manifest = Manifest("m.csv", {"smiles": spelt}, ("DNA",), [()] * 8, [None] * 8, {})
    for seed in range(8):
        train, held = split_rows(manifest, "smiles", .3, seed)
        assert len({0, 1, 2} & set(held)) in (0, 3)
    assert set(split_rows(manifest, "smiles=CCN")[1]) == {0, 1, 2}


def test_values_of_a_split_may_hold_molecules():
    columns = {"smiles": ["OCC", "CCN", "CCO"], "batch": ["B0", "B0", "B1"],
               "SMILES": ["OCC", "CCN", "CCO"]}
    manifest = Manifest("m.csv", columns, ("DNA",), [()] * 3, [None] * 3, {})
    assert set(split_rows(manifest, "smiles+batch=CCO+B0")[1]) == {0}
    assert set(split_rows(manifest, "SMILES=CCO")[1]) == {0, 2}


@pytest.mark.parametrize("words, says", [
    (["simulate", "--seed", "-1"], "seeds from 0 on"),
    (["simulate", "--out", "/proc/none/x"], "/proc/none"),
    (["show", "m.csv", "--out", "sheet.xyz"], "sheet.xyz"),
])
def test_commands_of_data_end_in_one_line(refused, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    refused(data, *words, says=[says])


def test_show_names_a_dose_that_is_no_number(refused, tmp_path):
    np.save(tmp_path / "a.npy", IMAGE.astype(np.uint8))
    path = write_manifest(tmp_path, [{"image": "a.npy", "dose": d, "dose_unit": "uM"} for d in
                                     ("x", "1")])
    refused(data, "show", path, says=["row 2, column dose: x is not a number"])


def test_a_field_smaller_than_any_scale_bar_is_drawn(tmp_path):
    data.picture(tmp_path / "a.png", [[np.zeros((5, 8, 8))]], data.CHANNELS, pixel_um=.05)
    assert (tmp_path / "a.png").exists()


def test_a_palette_is_no_image_when_it_is_first_read(tmp_path):
    """Also where its header was not looked at before."""
    Image.fromarray(IMAGE[0].astype(np.uint8)).convert("P").save(tmp_path / "p.png")
    with pytest.raises(DataError, match="mode P"):
        data.read_file(tmp_path / "p.png")
