"""Every command of README.md and assets/lab.md runs, those of assets/results.md parse, and what the
three name exists."""
import re
import runpy
import shlex
import shutil
import textwrap

import numpy as np
import torch

import conftest
import data
import evaluate
import sample
import train_ldm
import train_vae

SCRIPTS = {f"{m.__name__}.py": m for m in (data, train_vae, train_ldm, sample, evaluate)}
README, LAB, RESULTS = ((conftest.ROOT / f).read_text() for f in (
    "README.md", "assets/lab.md", "assets/results.md"))
# what makes a command short, behind its own words: the first row whose words are all in it is taken
TRAIN, FEW = "--steps 2 --overwrite --workers 0 --no-compile", "--images 108 --steps 1"
SHORT = [("train_vae.py", f"{TRAIN} --width 16 --blocks 1"),
         ("train_ldm.py", "--control_column", f"{TRAIN} --batch 4 --views 1"),
         ("train_ldm.py", f"{TRAIN} --batch 4 --views 1 --size tiny"),
         ("sample.py", "--attribution", ""),
         ("sample.py", "--edit", "--steps 2"),
         ("sample.py", "--film", "--steps 2"),
         ("sample.py", "--steps 1 -n 1"),
         ("evaluate.py", "quality", f"{FEW} --images 24 --quick"),
         ("models", f"{FEW} --train_steps 2 --seeds 0 --confounding .5 --models joint"),
         ("evaluate.py", "disentangle", f"{FEW} --quick"),
         ("evaluate.py", "control", "--images 8 --steps 1 --samples 1 --quick"),
         ("data.py", "")]
SMALL = {"batch=B1,B2,B3,B4,B5,B6": "batch=B1,B2", "field.tif": "field.npy"}


def commands(text, start="python "):
    """Commands in indented blocks and backticks, as lists of words from the script's name on."""
    text = re.sub(r"(`[^`\n]+)\n *([^`\n]+`)", r"\1 \2", text.replace("\\\n", " "))
    parts = re.findall(r"^    (.+)$|`([^`\n]+)`", text, flags=re.MULTILINE)
    parts = [c.strip() for block, inline in parts for c in (block or inline).split("&&")]
    return [shlex.split(c, comments=True)[start == "python ":] for c in dict.fromkeys(parts)
            if re.match(start + r"\w+\.py( |$)", c)]


def test_every_command_of_the_front_page_and_of_the_lab_runs(screen, cli, tmp_path, monkeypatch):
    """On a small screen and two plates of noise; evaluate.py simulates noise, learns two steps."""
    shutil.copytree(screen.parent, tmp_path / "runs" / "data",
                    ignore=shutil.ignore_patterns("controls*"))
    (tmp_path / "plates").mkdir()
    monkeypatch.chdir(tmp_path)
    fit = evaluate.fit
    monkeypatch.setattr(evaluate, "fit", lambda net, loss, steps, *more: fit(net, loss, 2, *more))
    monkeypatch.setattr(evaluate, "rendered", lambda rows, screen, intensity: (
        2 * torch.rand(len(rows), 5, screen.size, screen.size) - 1))
    np.save("field.npy", np.zeros((48, 40), np.uint8))
    np.save("plates/stack.npy", np.random.default_rng(0).integers(0, 255, (16, 5, 160, 160), "u1"))
    data.write_manifest("plates/index.csv", [
        dict(image="stack.npy", index=i, plate=f"P{i // 8}", well=f"A{i:02}", compound=f"C{i % 2}",
             smiles=("CS(C)=O", "CCO")[i % 2], dose=5 * (i % 2)) for i in range(16)])
    train_vae.train(train_vae.Config(steps=2, width=16, blocks=1, workers=0))
    failed = []
    for words in dict.fromkeys(map(tuple, commands(README) + commands(LAB))):
        words = [SMALL.get(w, w) for w in words]
        if words[0] in SCRIPTS:
            extra = next(row[-1] for row in SHORT if all(w in words for w in row[:-1])).split()
            status, _, error = cli(SCRIPTS[words[0]], *words[1:], *extra)
            failed += [f"{' '.join(words + extra)}\n{error}"] if status else []
        elif words[0] == "unet.py":  # vae.py and diffusion.py take 20 s, and are tested elsewhere
            runpy.run_path(str(conftest.ROOT / words[0]), run_name="__main__")
    assert not failed, "\n".join(failed)


def test_the_other_commands_are_parsed(cli, monkeypatch):
    def stop(*_, **__):
        raise InterruptedError
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(data.Parser, name, lambda self, *words, parse=getattr(
            data.Parser, name): stop(parse(self, *words)))
    bare = [c for text in (README, LAB) for c in commands(text, "") if len(c) > 1]
    for words in commands(RESULTS) + bare:
        assert cli(SCRIPTS[words[0]], *words[1:])[::2] == (2, "error: \n"), " ".join(words)


def test_what_the_texts_point_to_exists():
    for line in re.search(r"```python\n(.*?)```", README, re.S)[1].splitlines():
        assert line.strip() in (conftest.ROOT / "train_ldm.py").read_text(), line
    assets = conftest.ROOT / "assets"
    for text, folder in (README, conftest.ROOT), (RESULTS, assets), (LAB, assets):
        assert "{{" not in text
        for link in re.findall(r"\]\(([^)#h][^)]*)\)", text):
            assert (folder / link).exists(), link
        for file, name in re.findall(r"(\w+\.py):([A-Za-z]\w*)", text):
            source = (conftest.ROOT / file).read_text()
            assert re.search(rf"^ *(def|class) {name}\b|^{name} = ", source, re.M), f"{file}:{name}"


def test_the_biased_ruler_of_the_lab(capsys):
    torch.manual_seed(0)
    exec(textwrap.dedent(re.search(r"^    import torch.*\n(    .*\n)+", LAB, re.M)[0]), {})
    eta, omega = map(float, re.findall(r"-?\d+\.\d+(?:e-\d+)?", capsys.readouterr().out)[:2])
    assert abs(eta - 8 / 215) < .002 and abs(omega) < .002
