"""The simulated microscope against its own written effects; manifests, image files, views, splits,
restained images, importers."""
import csv
import gzip
import io
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from numpy.testing import assert_allclose
from PIL import Image
from rdkit import Chem

import data
from conftest import ROOT
from data import Manifest, UserError, Views, load, read_manifest, split_rows, take_view

ROW = dict(row=5, column=5, site=1, batch="B1", plate="P01", true_mechanism="none", true_effect=0.)
SHARED = ROOT.parent / "shared" / "data"
SCREEN = data.Screen()
OPTICS = data.microscope(SCREEN)
IMAGE = np.random.default_rng(0).integers(0, 256, (5, 12, 10)).astype(np.uint8)
RAW = dict(rule="", low=[0.] * 5, high=[1e9] * 5)


def fields_of(n=8, **changes):
    return [data.draw_field(ROW | changes, SCREEN, OPTICS, [5, i]) for i in range(n)]


def write(folder, rows, name="m.csv"):
    folder.mkdir(exist_ok=True)
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        file.write("\n\n")  # a table may end in empty lines
    return folder / name


def table(**columns):
    n = len(next(iter(columns.values())))
    return Manifest("m.csv", columns, ("DNA",), ("image",), [None] * n, {})


def saved(folder, images, **words):
    """The manifest of these images, {name: array}, each in a file of its own."""
    for name, image in images.items():
        np.save(folder / f"{name}.npy", image)
    return read_manifest(write(folder, [{"image": f"{name}.npy"} for name in images]), **words)


def faults_of(call, *arguments, **words):
    with pytest.raises(UserError) as fault:
        call(*arguments, **words)
    return str(fault.value).splitlines()


# --- the simulated screen -------------------------------------------------------------------------

def test_molecules_are_distinct_carry_their_motif_and_differ_at_cliffs():
    found = data.molecules()
    assert len({m["smiles"] for m in found}) == len(found) == 320
    for m in found:
        motif = Chem.MolFromSmarts(data.MECHANISMS[m["mechanism"]]["motif"].lstrip("/"))
        assert Chem.MolFromSmiles(m["smiles"]).HasSubstructMatch(motif), m
    ec50 = {m["smiles"]: m["ec50"] for m in found}
    a, b = (ec50[data.canonical(f"{r}c1ccc(B(O)O)cc1")] for r in ("C[C@H](O)", "C[C@@H](O)"))
    assert b / a >= 8


@pytest.mark.parametrize("confounding", [0., .9])
def test_confounding_and_what_is_held_out(confounding):
    rows = data.layout(replace(SCREEN, confounding=confounding, sites=2))
    home = {m: f"B{k % 6 + 1}" for k, m in enumerate(data.MECHANISMS)}
    share = np.mean([r["batch"] == home[r["true_mechanism"]] for r in rows if r["dose"]])
    assert abs(share - (confounding + (1 - confounding) / 6)) < .03
    train = [r for r in rows if r["split"] in ("train", "val")]
    for kind in ("val", "test"):
        held = data.heldout_combinations(6, kind)
        assert not [r for r in train if held.get(r["true_mechanism"]) == int(r["batch"][1:]) - 1]
    kind = {m["smiles"]: m["kind"] for m in data.molecules()}
    assert {kind[r["smiles"]] for r in train if r["dose"]} == {"train"}
    wells = {(r["plate"], r["well"], r["split"]) for r in rows}  # sites stay together
    assert len(wells) == len({well[:2] for well in wells}) == len(rows) / 2
    for r in rows[::97]:
        expected = 1 / (1 + (r["true_ec50"] / r["dose"]) ** 1.5) if r["dose"] else 0.
        assert_allclose(r["true_effect"], expected, atol=1e-3)


@pytest.mark.parametrize("mechanism, measure, sign", [
    ("dna_damage", "nucleus_radius", 1), ("apoptosis", "nuclei", -1), ("golgi", "AGP", 1),
    ("tubulin", "binucleation", 1), ("mitochondria", "Mito", -1), ("er_stress", "RNA", 1),
    ("actin", "AGP", -1), ("nucleolar", "RNA", -1)])
def test_each_mechanism_does_what_it_says_to_the_same_cells(mechanism, measure, sign):
    before, after = fields_of(), fields_of(true_mechanism=mechanism, true_effect=.9)
    for a, b in zip(after, before):
        assert_allclose(a["untreated"], b["image"])
    a, b = (np.mean([x["image"][data.CHANNELS.index(measure)] if measure in data.CHANNELS else
                     x["truth"][f"true_{measure}"] for x in fields]) for fields in (after, before))
    assert sign * (a / b - 1) > .03, (a, b)


def test_batches_differ_plates_a_little_edges_in_cells_and_sites_in_light():
    def er(**where):
        return np.mean([f["image"][1] for f in fields_of(6, cells=7, **where)])
    batch = [er(batch=f"B{b}", plate=f"P{2 * b - 1:02d}") for b in range(1, 7)]
    assert np.std(np.log(batch)) > 2 * np.std(np.log([er(plate=p) for p in ("P01", "P02")])) > 0
    inner, edge = (np.mean([f["truth"]["true_nuclei"] for p in range(1, 13)
                            for f in fields_of(4, plate=f"P{p:02d}", **where)])
                   for where in (dict(row=4, column=9), dict(row=20, column=1)))
    assert edge < .9 * inner
    left, right = (np.mean([f["image"][1] for f in fields_of(site=s)], 0) for s in (1, 2))
    assert left[:, :20].mean() / left[:, -20:].mean() > right[:, :20].mean() / right[:, -20:].mean()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(the rows of a layout of 66 wells, their manifest, their settings)"""
    settings = data.Screen(batches=3, replicates=1, sites=1, controls_per_plate=8, size=32)
    rows = data.layout(settings)[::20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "layout", lambda _: rows)
        return rows, data.simulate(tmp_path_factory.mktemp("small"), settings), settings


def test_a_screen_follows_from_its_seed_and_is_a_manifest_like_any_other(small):
    rows, path, settings = small
    drawn = data.draw_field(rows[40], settings, data.microscope(settings), [0, 0, 4, 40])
    for column in ("image", "untreated", "brightfield"):
        manifest = read_manifest(path, None, column)
        assert_allclose(manifest.read(40), drawn[column])
    assert manifest.columns["smiles"] == [r["smiles"] for r in rows]
    gain, same, other = (data.microscope(replace(SCREEN, **s))[0]["B1"]["gain"]
                         for s in ({}, dict(draw=9), dict(seed=1)))
    assert_allclose(gain, same)  # another draw, the same microscopes
    assert abs(gain - other).max() > .05


# --- image files and manifests --------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def bytes_of(save, *content, **words):
    buffer = io.BytesIO()
    save(buffer, *content, **words)
    return buffer.getvalue()


def tiff(image, photometric="minisblack", **words):
    return bytes_of(tifffile.imwrite, image, photometric=photometric, **words)


DEEP, NOISE = IMAGE[:3] * np.uint16(200), bytes(range(256)) * 9
LAST, RGB = np.moveaxis(DEEP, 0, 2), Image.fromarray(np.stack([*IMAGE[:3]], 2))
PAGES, PALETTE = [Image.fromarray(x) for x in DEEP], Image.fromarray(IMAGE[0]).convert("P")
NPZ, DEEP_RGB = bytes_of(np.savez, sample=IMAGE), bytearray(bytes_of(PAGES[0].save, "png"))
DEEP_RGB[25] = 2  # says that it is RGB of 16 bits
OME = """<?xml version="1.0"?><OME UUID="urn:uuid:0"><Image ID="I:0"><Pixels DimensionOrder="XYCZT"
ID="P" SizeX="10" SizeY="12" SizeC="3" SizeZ="1" SizeT="1" Type="uint16">""" + "".join(
    f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{c}.ome.tif">urn:uuid:{c}'
    '</UUID></TiffData>' for c in range(3)) + "</Pixels></Image></OME>"
FILES = [  # what is read of a file, or what the refusal says
    ("last.tif", tiff(LAST), DEEP),
    ("planar.tif", tiff(DEEP, "rgb", planarconfig="separate", compression="zlib"), DEEP),
    ("deep_rgb.tif", tiff(LAST, "rgb", compression="zlib"), DEEP),
    ("lzw_rgb.tif", bytes_of(RGB.save, "tiff", compression="tiff_lzw"), IMAGE[:3]),
    ("lzw_pages.tif", bytes_of(PAGES[0].save, "tiff", compression="tiff_lzw", save_all=True,
                               append_images=PAGES[1:]), DEEP),
    ("last.npy", bytes_of(np.save, LAST.astype(">u2")), DEEP),
    ("pickle_beside.npz", bytes_of(np.savez, sample=LAST, b=np.array([{}], object)), DEEP),
    ("rgb.png", bytes_of(RGB.save, "png"), IMAGE[:3]), ("gone.tif", None, "no image file"),
    ("white_is_zero.tif", tiff(DEEP, "miniswhite"), "MINISWHITE"),
    ("palette.tif", bytes_of(PALETTE.save, "tiff"), "PALETTE"),
    ("z_stack.tif", tiff(DEEP, imagej=True, metadata={"axes": "ZYX"}), "ZYX"),
    ("time.tif", tiff(DEEP, ome=True, metadata={"axes": "TYX"}), "axes"),
    ("sibling_lost.tif", tiff(DEEP[0], metadata=None, description=OME), "has 1 channels, 3 exp"),
    ("jpeg.tif", bytes_of(RGB.save, "tiff", compression="jpeg"), "JPEG"),
    ("cut.tif", tiff(DEEP[0])[:-30], "got 210"), ("noise.tif", NOISE, ""),
    ("photo.jpg", b"\xff\xd8", "no image format"),
    ("pointer.tif", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ("cut.png", bytes_of(PAGES[0].save, "png")[:-30], "truncated"),
    ("deep.png", DEEP_RGB, "16 bits"), ("palette.png", bytes_of(PALETTE.save, "png"), "type 3"),
    ("bomb.npy", pickle.dumps(Bomb()), ""), ("cut.npz", NPZ[:-200], ""),
    ("bomb.npz", bytes_of(np.savez, sample=np.array([Bomb()], object)), "")]


@pytest.mark.parametrize("name, content, expected", FILES, ids=[name for name, *_ in FILES])
def test_files_are_read_as_they_are_or_refused_in_one_line(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = write(tmp_path, [{"image": name}])
    if isinstance(expected, str):
        fault, = faults_of(read_manifest, path, "abc")
        assert "row 2, column image" in fault and name in fault and expected in fault
    else:
        assert_allclose(read_manifest(path, "abc").read(0), expected)


def test_stains_may_have_files_of_their_own(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE[0], compression="zlib")
    Image.fromarray(IMAGE[1]).save(tmp_path / "b.png")
    manifest = read_manifest(write(tmp_path, [{"A": "a.tif", "B": "b.png"}]), "AB")
    assert_allclose(manifest.read(0), IMAGE[:2])


@pytest.mark.parametrize("text, channels, says", [
    ("image\n", "A", "no rows"), (b"\xff\xfe\x00\x01", "A", "is unreadable"),
    ("picture\nx.npy\n", "A", "no column image"), ("A,B\na,b\n", "ABC", "no column C"),
    ("image,dose,dose\na.npy,1,2\n", "A", "more than one column dose"),
    ("image,a\na.npy\n\na.npy,1\na.npy,1,2\n", "A",
     "row 2: 1 values for 2.*row 3: 0 values.*row 5: 3 values"),
    ("A,B\na.npy,b.npy\n", "ABA", "channel A is named twice.*column A"),
    ("A,B,C\nb.npy,a.npy,b.npy\nb.npy,a.npy,a.npy\n", "ABC",
     "row 2: columns A and C name the same file.*row 3: columns B and C.*row 2, column B"),
    ("image,index\nb.npy,x\nb.npy,²\na.npy,9\n", "A",
     "row 2, column index: x.*row 3, column index: ².*row 4, column image.*column index"),
    ("image,index\nx.tif,\n" + "y.tif,x\n" * 30, "A", "row 3, column index.*and 12 more")])
def test_every_fault_of_a_table_is_named(tmp_path, text, channels, says):
    np.save(tmp_path / "a.npy", IMAGE)
    np.save(tmp_path / "b.npy", IMAGE[0])
    (tmp_path / "m.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = faults_of(read_manifest, tmp_path / "m.csv", channels)
    assert re.search("(?s)" + says, "\n".join(found)) and len(found) < 22, found


def test_wrong_images_are_refused_also_beyond_those_that_are_checked(tmp_path):
    images = dict(a=IMAGE, b=IMAGE / 2, c=IMAGE[:4], d=IMAGE[:, :9], e=IMAGE * np.uint16(257))
    assert len(faults_of(saved, tmp_path, images)) == 2
    views = Views(read_manifest(tmp_path / "m.csv", check=4), RAW)
    for i, text in enumerate(["", "row 3, column image.*float64", "row 4, column image.*4 channels",
                              "row 5: 5 channels of 10x9", "row 6, column image.*16 bits"]):
        x, fault = views[i, -1]
        assert x.shape == (5, 12, 10) and bool(x.isnan().all()) == bool(fault) == bool(text)
        assert re.search(text, fault)


def test_one_stain_in_two_depths_is_refused_or_scaled_by_file(tmp_path):
    manifest = saved(tmp_path, dict(a=IMAGE, b=IMAGE * np.uint16(257)))
    for rule in ("percentile", "0:4095"):
        fault, = faults_of(data.fit_intensity, rule, manifest, [0, 1])
        assert "column image: row 2 has 8 bits, row 3 has 16 bits" in fault
    views = Views(manifest, data.fit_intensity("dtype", manifest, [0, 1]))
    for x, _ in (views[0, -1], views[1, -1]):
        assert_allclose(x, IMAGE / 127.5 - 1, atol=1e-6)


# --- intensities, views, splits -------------------------------------------------------------------

def test_intensity_rules(tmp_path):
    ramp = np.arange(4000, dtype=np.uint16).reshape(40, 100)
    manifest = saved(tmp_path, {"a": np.stack([ramp, 2 * ramp, 3 * ramp, ramp, ramp])})
    assert data.fit_intensity("0:4095", manifest, [0])["high"] == [4095] * 5
    fitted = data.fit_intensity("percentile", manifest, [0])
    assert_allclose(fitted["high"][1], 2 * 3995, rtol=.01)
    scaled = Views(manifest, fitted)[0, -1][0]
    assert scaled.min() == -1 and scaled.max() == 1 and abs(scaled.mean()) < .01
    for rule in ("bright", "0:inf", "5:5", "1:2:3"):
        assert "or a range" in faults_of(data.fit_intensity, rule, manifest, [0])[0]
    dark = saved(tmp_path, {"b": np.stack([*[ramp] * 4, 0 * ramp])})
    assert "Mito has no" in faults_of(data.fit_intensity, "percentile", dark, [0])[0]


def test_an_image_is_read_once(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (5, 8, 8), np.uint8)
    views = Views(saved(tmp_path, {"one": image}), RAW)
    first, _ = views[0, -1]
    (tmp_path / "one.npy").unlink()
    assert torch.equal(views[0, -1][0], first) and first.isfinite().all()


def test_views_are_crops_in_all_eight_orientations(tmp_path):
    image = np.arange(2 * 9 * 9, dtype=np.float32).reshape(2, 9, 9)
    rng = np.random.default_rng(0)
    assert len({take_view(image, 0, rng).tobytes() for _ in range(200)}) == 8
    assert len({take_view(image, 4, rng, flips=False)[0, 0, 0] for _ in range(600)}) == 36
    assert_allclose(take_view(image, 5), image[:, 2:7, 2:7])
    manifest = saved(tmp_path, {"a": IMAGE})
    assert "5 channels of 10x12" in Views(manifest, RAW, crop=11)[0, 0][1]
    binned = data.bin_pixels(manifest.read(0), 2)  # the mean of squares
    assert binned.shape == (5, 6, 5) and binned[3, 4, 2] == IMAGE[3, 8:10, 4:6].mean()


def test_a_view_follows_from_its_key_alone(tmp_path):
    """So a conditioning image is cut and turned like its target, whatever else can be read, and
    the same in any number of processes."""
    target = np.random.default_rng(0).integers(0, 255, (9, 5, 12, 12)).astype(np.uint8)
    for i, image in enumerate(target):
        np.savez(tmp_path / f"t{i}.npz", image)
        np.save(tmp_path / f"h{i}.npy", image[:1])
    path = write(tmp_path, [{"image": f"t{i}.npz", "hint": f"h{i}.npy"} for i in range(9)])
    keys = [(i, v) for i in range(9) for v in (0, 1, -1)]
    targets = Views(read_manifest(path), RAW, crop=8, seed=3)
    hints = Views(read_manifest(path, None, "hint"), RAW | {"low": [0.], "high": [1e9]}, 8, seed=3)
    (tmp_path / "t3.npz").write_bytes(b"cut")
    state = torch.get_rng_state()
    x, rows = (np.concatenate(v) for v in zip(*load(targets, keys, 4, 2, max_corrupt=.5)))
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from torch
    assert list(rows) == [i for i, _ in keys] and x.dtype == np.float32
    hint, lost = torch.cat([h for h, _ in load(hints, keys)]).numpy(), rows == 3
    assert_allclose(x[~lost, :1], hint[~lost])
    assert np.isnan(x[lost]).all() and len(np.unique(hint.reshape(27, -1), axis=0)) > 20
    again = np.concatenate([v for v, _ in load(targets, keys[::-1], max_corrupt=.5)])[::-1]
    assert_allclose(x, again)
    assert abs(Views(targets.manifest, RAW, 8)[0, 0][0].numpy() - x[0]).max() > 0  # another seed


def test_unreadable_images_are_counted_among_those_asked_for(tmp_path, capsys):
    views = Views(saved(tmp_path, dict.fromkeys(range(20), IMAGE)), RAW)
    for i in range(7):
        (tmp_path / f"{i}.npy").write_bytes(b"")
    keys = [(i, v) for i in range(20) for v in range(9)]  # however often each is asked for
    assert len(list(load(views, keys, max_corrupt=.4))) == 3
    said = capsys.readouterr().out
    assert "7 of 20 images are unreadable" in said and "6.npy" not in said and "row 6," in said
    fault, = faults_of(list, load(views, keys, max_corrupt=.3))
    assert "(7 of 20 images are unreadable: more than 30.0%)" in fault


def test_splits_keep_groups_together_and_take_stated_values():
    plates = [f"P{i % 10}" for i in range(200)]
    train, held = split_rows(table(plate=plates), "plate", .2)
    assert len(held) == 40 and not {plates[i] for i in train} & {plates[i] for i in held}
    wells = [f"{'ABCDE'[i // 40]}{i // 8 % 5}" for i in range(200)]  # eight sites of each
    train, held = split_rows(table(plate=["P1"] * 200, well=wells))
    assert len(held) == 16 and not {wells[i] for i in train} & {wells[i] for i in held}
    columns = dict(drug=["a", "a", "b", "b"] * 5, plate=["1", "2"] * 10)
    assert list(split_rows(table(**columns), "drug+plate=b+2")[1]) == list(range(3, 20, 4))
    train, held = split_rows(table(split=["train", "val", "test_pair", "train"]))
    assert (list(train), list(held)) == ([0, 3], [1])
    for how, says in (("dose", "no column dose"), ("plate=9", "no row has it")):
        assert says in faults_of(split_rows, table(**columns), how)[0]
    assert "nothing is left" in faults_of(split_rows, table(plate=["1"] * 3), "plate")[0]
    assert "train and val" in faults_of(split_rows, table(split=["training", "val"]))[0]


def test_held_out_molecules_are_so_in_every_spelling_and_leave_negative_controls_in_training():
    spelt = ["CC[NH3+].[Cl-]", "CCN", "Cl.NCC", "OCC", "C(O)C", "*CC", "C(*)C", "c1ccccc1", "*CCC"]
    smiles, dose = ["CS(C)=O", "CCO", "CCN", "CCC", "CCCC"], ["0", "1", "2", "3", "0"]
    for seed in range(10):
        _, held = split_rows(table(smiles=spelt), "smiles", .3, seed)
        for same in ({0, 1, 2}, {3, 4}, {5, 6}):
            assert len(same & set(held)) in (0, len(same))
        _, held = split_rows(table(smiles=smiles, dose=dose), "smiles", .5, seed)
        assert len(held) == 2 and not {0, 4} & set(held)
    assert len({data.molecule_key(s) for s in ("*CC", "*CCC", "")}) == 3  # none has an InChI
    held = data.negative_controls(dict(Dose=["0", "0.0", "", "1"], conc_2=["0", "", "0", "0"]))
    assert list(held) == [True, False, False, False]


# --- manifests made from manifests ----------------------------------------------------------------

def filtered(noise, sigma, gain, level):
    """White noise (..., H, W) under a microscope: blurred, amplified, on a background."""
    return (gain * data.smooth(noise, sigma) + level).astype(np.float32)


OPTICS_OF = {"sharp": (.6, .2, -.3), "dull": (1.1, .5, .2), "": (.6, .2, 0.)}


@pytest.fixture
def plates(tmp_path):
    """A manifest of two plates of known optics: on each 16 negative controls and 6 wells of one
    treatment, with the day of the plate; and a well without a plate."""
    noise, rows = np.random.default_rng(0).standard_normal((45, 1, 64, 64), np.float32), []
    for i, x in enumerate(noise):
        plate = ("sharp", "dull")[i % 2] if i < 44 else ""
        image = (filtered(x, *OPTICS_OF[plate]).clip(-1, 1) + 1) * 2000
        tifffile.imwrite(tmp_path / f"{i}.tif", image[0].astype(np.uint16))
        rows.append({"image": f"{i}.tif", "smiles": "CCO" if i >= 32 else "CS(C)=O",
                     "dose": 3 * (i >= 32), "plate": plate, "well": f"A{i // 4}", "row": i,
                     "day": {"sharp": 4, "dull": 9}.get(plate, ""), "mask": f"{i}.tif",
                     "split": "val" if i in (42, 43) else "train"})
    return write(tmp_path, rows), noise


def restained(cli, path, out, *words):
    status, said, error = cli(data, "restain", path, "--channels", "DNA", "--out", out, *words)
    assert status == 0, error
    made = read_manifest(out / "manifest.csv", ("DNA",))
    return made, {name: np.array(values) for name, values in made.columns.items()}, said


def test_copies_are_shown_and_told_as_the_other_plate(plates, tmp_path, cli):
    path, noise = plates
    path.with_name("simulation.json").write_text("{}")
    made, columns, said = restained(cli, path, tmp_path / "out", "--share", .75)
    assert (tmp_path / "out" / "simulation.json").exists()
    assert len(made) == 45 + 10 and "2 plates, 10 images; 1 other treated images" in said
    assert columns["image"][0] == "../0.tif" and columns["mask"][40] == "../40.tif"
    assert set(columns["mask"][45:]) == {""}  # a file of the original's cells
    assert list(columns["plate"][45:]) == ["dull", "sharp"] * 5
    assert list(columns["day"][45:]) == ["9", "4"] * 5       # one for a plate: goes with it
    assert list(columns["row"][45:]) == list(map(str, range(32, 42)))
    assert set(columns["split"][45:]) == {"train"} and columns["split"][42] == "val"
    weight = [float(w or 0) for w in columns["weight"]]
    assert_allclose(weight, [1] * 32 + [.25] * 10 + [0, 0, 1] + [.75] * 10)
    for k in (45, 54):
        wanted = (filtered(noise[k - 13], *OPTICS_OF[columns["plate"][k]]).clip(-1, 1) + 1) * 2000
        own = made.read(k - 13).astype(float)
        assert np.square(made.read(k) - wanted).mean() < .02 * np.square(own - wanted).mean()


def test_weights_balance_the_treated_alone_and_what_cannot_be_restained_is_refused(
        plates, tmp_path, cli, refused):
    rows, out = list(csv.DictReader(open(plates[0]))), tmp_path / "o"
    few = write(tmp_path, rows[17:], "few.csv")
    weighted = write(tmp_path, [row | {"weight": 1} for row in rows], "weighted.csv")
    for words, says in (([few, "--share", 1.5], "between 0 and 1"), ([weighted], "weights"),
                        ([few, "--balance", "moa"], "no column moa"), ([few], "8 negative")):
        words = ("restain", *words, "--channels", "DNA", "--out", out)
        assert len(refused(data, *words, says=[says])) == 1 and not out.exists()
    rows[40]["smiles"] = rows[41]["smiles"] = "CCN"
    _, columns, _ = restained(cli, write(tmp_path, rows), out, "--share", 0, "--balance", "smiles",
                              "plate")
    weight = np.array([float(w or 0) for w in columns["weight"]])
    assert len(weight) == 45 and set(weight[:32]) == {1.}
    assert_allclose(weight[[40, 41, 44]] / weight[32], 4, rtol=1e-4)
    assert_allclose(weight[32:45].sum(), 11, rtol=1e-4)  # held out: none


def test_controls_lists_all_negative_controls_of_other_wells(plates, tmp_path, cli, refused):
    rows = list(csv.DictReader(open(plates[0])))
    words = ("--channels", "DNA", "--by", "plate", "--out", tmp_path / "n" / "c.csv")
    alone = write(tmp_path, [r | {"well": "A1"} for r in rows[:44]], "a.csv")
    for path, says in ((plates[0], "row 46: plate blank"), (
            alone, "row 2: plate sharp has no negative control (dose 0) in another well")):
        refused(data, "controls", path, *words, says=[says])
    assert cli(data, "controls", write(tmp_path, rows[:44], "whole.csv"), *words)[0] == 0
    made = read_manifest(tmp_path / "n" / "c.csv", ("DNA",))
    for i, listed in enumerate(made.columns["control_row"]):
        assert [int(k) - 2 for k in listed.split()] == [
            k for k in range(32) if k % 2 == i % 2 and k // 4 != i // 4]


# --- published data sets --------------------------------------------------------------------------

def test_mol2image_download_becomes_a_manifest(tmp_path, cli):
    keys = [f"24277-{well}-{site}" for well in ("A03", "B07", "C01", "D2") for site in (1, 2)]
    for key in keys:
        np.savez(tmp_path / f"{key}.npz", sample=np.moveaxis(IMAGE, 0, 2))
    rows = [dict(zip(("PLATE_ID", "WELL_POSITION", "SITE"), key.split("-")), SAMPLE_KEY=key,
                 BROAD_ID="B1", SMILES="CCO", INCHIKEY="K") for key in (*keys, "24277-A05-1")]
    splits = [write(tmp_path, rows[:6] + rows[8:], "datasplit_gen_train.csv"),
              write(tmp_path, rows[6:8], "datasplit_gen_test_hard.csv")]
    out = tmp_path / "made" / "manifest.csv"
    words = ("mol2image", tmp_path, *splits, "--out", out, "--val",
             data.share_of("24277-B07") + 1e-6)
    status, said, error = cli(data, *words)
    assert status == 0, error
    assert "1 listed images are not in" in said and "24277-A05-1" in said
    manifest = read_manifest(out, re.search(r"--channels (\S+)", said)[1].split(","))
    columns, split = manifest.columns, manifest.columns["split"]
    assert columns["well"][::2] == ["A03", "B07", "C01", "D02"]
    assert split[6:] == ["test_hard"] * 2 and set(split[:6]) == {"train", "val"}
    assert split[:6:2] == split[1:6:2]  # sites of a well: on one side
    assert_allclose(manifest.read(0), IMAGE)


def test_load_data_tables_become_a_manifest(tmp_path, cli, refused):
    rows = [{"FileName_OrigDNA": f"{w}_d.tif" if w != "c3" else "", "PathName_OrigDNA": "/cloud/i",
             "FileName_IllumDNA": "x.npy", "Metadata_Plate": "P1", "Metadata_Well": w,
             "Metadata_Row": r} for w, r in (("A01", ""), ("B2", "7"), ("c3", ""), ("r04", "4"))]
    out = tmp_path / "m.csv"
    (tmp_path / "compound.csv").write_text("Metadata_JCP2022,Metadata_SMILES\nJ1,CCO\n")
    with gzip.open(tmp_path / "well.csv.gz", "wt") as file:
        file.write("Metadata_Plate,Metadata_Well,Metadata_JCP2022\nP1,A1,J1\nP1,b02,J2\n")
    words = ("load_data", write(tmp_path / "csv", rows), "--root", f"/cloud={tmp_path}", "--out",
             out, "--join", f"{tmp_path}/well.csv.gz:Metadata_Plate,well")
    status, said, error = cli(data, *words, f"{tmp_path}/compound.csv:JCP2022")
    assert status == 0, error
    assert "2 of 4 images matched on plate, well" in said and "1 of 4" in said
    columns = data.read_table(out)
    assert columns["well"] == ["A01", "B02", "C03", "r04"]
    assert columns["smiles"] == ["CCO", "", "", ""]
    assert columns["row"] == ["1", "7", "3", "4"] and columns["column"] == ["1", "2", "3", ""]
    assert columns["DNA"] == ["i/A01_d.tif", "i/B2_d.tif", "", "i/r04_d.tif"]
    out.unlink()
    for text, on, says in (
            ("JCP2022,smiles\nJ1,C\nJ1,N\n", "jcp2022", "two different rows for jcp2022 J1"),
            ("plate,well,smiles\nP2,A1,C\n", "plate,well", "no image matches; the first has")):
        (tmp_path / "t").write_text(text)
        refused(data, *words, f"{tmp_path}/t:{on}", says=[says])
    assert not out.exists()


def test_show_names_what_is_odd_and_every_fault(tmp_path, cli):
    for name, kind in (("a", np.uint8), ("b", np.uint16)):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as file:
            file.write(np.stack([IMAGE[0], 0 * IMAGE[0]]).astype(kind), metadata={"axes": "CYX"})
            file.write(IMAGE[0, :5])
    rows = [{"image": f"{n}.tif", "smiles": "CCO", "dose": 1, "dose_unit": "uM"} for n in "ab"]
    words = ("show", write(tmp_path, rows), "--channels", "A,B", "--out", tmp_path / "sheet.png")
    status, out, error = cli(data, *words)
    assert status == 0, error
    assert Image.open(tmp_path / "sheet.png").height > 100
    for says in ("row 2 has 8 bits, row 3 has 16 bits", "a.tif (as 2 files) holds series",
                 "channel B is zero everywhere in 2 of 2 images: row 2, 3\n"):
        assert says in out
    write(tmp_path, [r | {"smiles": "C(", "dose": "x"} for r in rows] + [rows[0] | {"image": "c"}])
    status, out, error = cli(data, *words)
    assert status == 2 and "3 images, channels A, B" in out and len(error.splitlines()) == 5
    for says in ("row 2, column smiles: C( is", "row 3, column dose: x", "row 4, column image: "):
        assert says in error


def test_commands_end_in_one_line_and_write_nothing_over(small, refused):
    before = small[1].read_bytes()
    for words, says in ((["simulate", "--seed", "-1"], "seeds from 0 on"),
                        (["simulate", "--mol", "3"], "unrecognized"),
                        (["simulate", "--out", "/proc/none/x"], "/proc/none"),
                        (["simulate", "--out", small[1].parent], "exists: choose another --out"),
                        (["show", small[1], "--out", "sheet.xyz"], "sheet.xyz")):
        assert len(refused(data, *words, says=[says])) == 1
    assert small[1].read_bytes() == before


@pytest.mark.skipif(not SHARED.exists(), reason="no real plates beside this checkout")
def test_real_plates_are_read_as_published(tmp_path):
    lincs = read_manifest(SHARED / "lincs" / "index.csv")
    assert lincs.sizes == {(1080, 1080): "row 2"} and lincs.depths["ER"] == {8: "row 2"}
    bray = ("bray2017/{}.tif", ("Hoechst", "ERSyto", "ERSytoBleed", "Ph_golgi", "Mito"))
    phenix = "phenix_brightfield/r03c03f03p01-ch{}sk1fk1fl1.tiff", (5, 2, 6, 3, 4)
    manifest = read_manifest(write(tmp_path, [{c: f"{SHARED}/{file.format(k)}" for c, k in zip(
        data.CHANNELS, names)} for file, names in (bray, phenix)]))
    assert set(manifest.sizes) == {(520, 696), (1080, 1080)} and manifest.read(0).max() < 4096
