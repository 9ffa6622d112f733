"""Metadata and molecules to what the U-Net receives: a vector, and tokens for cross-attention.

A field is a metadata column with a kind (molecule, number, log, category) and a group (biology or
experiment). As in DiffusionSat (Khanna et al. 2024, arXiv:2312.03606) a number is scaled to the
timestep's range, goes through the timestep's sinusoid and an MLP of its own, and is added to the
timestep embedding. Unlike there, absence is a learned null and not the legal value 0, each group
is normalised, and the combinations that guidance needs are trained on purpose (`draw_keep`).

    python conditioning.py      # which fields were dropped, and the size of each group's part
"""
import argparse
import itertools
import math
from dataclasses import dataclass, field as dataclass_field

import torch
import torch.nn as nn
import torch.nn.functional as F
from rdkit import Chem, RDLogger
from rdkit.Chem import rdFingerprintGenerator
from tqdm import tqdm

RDLogger.DisableLog("rdApp.*")
KINDS = ("molecule", "number", "log", "category")
OUTCOMES = ("true_", "n_nuclei", "IMG_CNT_CELLS")  # measured from the image: telling them leaks it


class FieldError(ValueError):
    """A fault in the fields or in a request, one line each."""


# --- fields: what each column means, learned from the training rows ------------------------------

@dataclass
class Field:
    """One condition. `low`, `high` and `vocabulary` are learned by `fit` from training rows."""
    name: str
    kind: str
    group: str
    low: float = 0.     # smallest training value; of a log field the smallest above zero
    high: float = 1.    # largest training value
    vocabulary: list = dataclass_field(default_factory=list)  # categories, sorted

    def fit(self, values):
        """Learn the range or the vocabulary from strings; blanks are skipped. Returns self."""
        known = [v for v in values if v != ""]
        if not known:
            raise FieldError(f"column {self.name} is blank in every training row")
        if self.kind == "category":
            self.vocabulary = sorted(set(known), key=natural)
        elif self.kind in ("number", "log"):
            numbers = [float(v) for v in known if self.kind == "number" or float(v) > 0] or [1.]
            self.low, self.high = min(numbers), max(numbers)
        return self

    def scale(self, value):
        """A number to the timestep's range [0, 1000], shifted, scaled and clipped.

        log: log1p(dose / smallest positive training dose), so that dose 0 is legal and is 0.
        """
        if self.kind == "log":
            share = math.log1p(value / self.low) / math.log1p(self.high / self.low)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1.)
        return 1000 * min(max(share, 0.), 1.)

    def encode(self, values):
        """Strings to a tensor (N,) and a mask (N,) of what is known. Numbers are scaled; a
        category is its place in the vocabulary; molecules are encoded by `Conditioner`."""
        codes, known = [], [v != "" for v in values]
        for value in values:
            if value == "":
                codes.append(0)
            elif self.kind == "category":
                if value not in self.vocabulary:
                    raise FieldError(f"unknown {self.name} {value}: known are "
                                     + ", ".join(self.vocabulary))
                codes.append(self.vocabulary.index(value))
            else:
                codes.append(self.scale(parse_number(self.name, value)))
        dtype = torch.long if self.kind == "category" else torch.float32
        return torch.tensor(codes, dtype=dtype), torch.tensor(known)


def natural(text):
    """Sort key that puts B10 after B2."""
    return [(0, int(digits), "") if digits.isdigit() else (1, 0, digits)
            for digits in ("".join(g) for _, g in itertools.groupby(text, str.isdigit))]


def parse_number(name, text):
    try:
        value = float(text)
    except ValueError:
        raise FieldError(f"{name}={text}: not a number") from None
    if not math.isfinite(value):
        raise FieldError(f"{name}={text}: not a finite number")
    return value


def parse_fields(groups, columns):
    """Field specifications to Fields, not fitted yet.

    groups: {group: ["smiles:molecule", "dose", ...]}, the kind optional where it can be told.
    columns: {name: list of strings}. All faults are reported together.
    """
    fields, faults = [], []
    for group, specifications in groups.items():
        for specification in specifications:
            name, _, kind = specification.partition(":")
            try:
                check_name(name, columns, [f.name for f in fields])
                field = Field(name, kind or guess_kind(name, columns), group)
                check_values(field, columns[name])
                fields.append(field)
            except FieldError as fault:
                faults.append(str(fault))
    if faults:
        raise FieldError("\n".join(faults))
    return fields


def guess_kind(name, columns):
    """The kind of a column whose name or contents tell it."""
    if name.lower() == "smiles":
        return "molecule"
    if name.lower().startswith(("dose", "conc")):
        return "log"
    if any(not is_number(v) for v in columns[name] if v != ""):
        return "category"
    raise FieldError(f"column {name} holds numbers: write {name}:category or {name}:number")


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_name(name, columns, earlier):
    """Refuse outcomes, repeats and columns that are not there."""
    if name.startswith(OUTCOMES):
        raise FieldError(f"field {name} is an outcome, measured from the image: as a condition it "
                         "would give the answer away")
    if name not in columns:
        raise FieldError(f"no column {name}: the manifest has {', '.join(columns)}")
    if name in earlier:
        raise FieldError(f"field {name} is given twice")


def check_values(field, values):
    """Refuse unknown kinds and values that do not fit the kind; each row is named."""
    if field.kind not in KINDS:
        raise FieldError(f"field {field.name}: unknown kind {field.kind}, one of "
                         + ", ".join(KINDS))
    fits, complaint = {
        "molecule": (lambda v: parse_smiles(v) is not None, "is no valid SMILES"),
        "number": (is_number, "is not a number"),
        "log": (lambda v: is_number(v) and float(v) >= 0, "is not a number of at least 0"),
        "category": (lambda v: True, "")}[field.kind]
    bad = {v for v in set(values) if v != "" and not fits(v)}
    faults = [f"row {i + 2}, column {field.name}: {v} {complaint}" for i, v in enumerate(values)
              if v in bad]
    if faults:
        more = [f"and {len(faults) - 10} more rows"] if len(faults) > 10 else []
        raise FieldError("\n".join(faults[:10] + more))


# --- molecule encoders ----------------------------------------------------------------------------

def parse_smiles(text):
    """SMILES to an RDKit molecule, a ChemAxon tail (` |c:5|`) cut off; None if it is none."""
    words = text.split()
    return Chem.MolFromSmiles(words[0]) if words else None


class Fingerprint(nn.Module):
    """Morgan counts (Rogers & Hahn 2010) through an MLP; charge and chirality are seen.

    An encoder has `featurise`, done once per molecule, and `forward`, done at every step.
    """
    bits, radius, tokens = 2048, 2, 4

    def __init__(self, embedding, token):
        super().__init__()
        self.pool = nn.Sequential(nn.Linear(self.bits, embedding), nn.SiLU(),
                                  nn.Linear(embedding, embedding))
        self.split = nn.Linear(embedding, self.tokens * token)

    @classmethod
    def featurise(cls, smiles):
        """List of SMILES to (M, bits): log1p of how often each circular fragment occurs."""
        morgan = rdFingerprintGenerator.GetMorganGenerator(
            radius=cls.radius, fpSize=cls.bits, includeChirality=True)
        slow = len(smiles) > 2000
        return torch.stack([
            torch.from_numpy(morgan.GetCountFingerprintAsNumPy(parse_smiles(s)).astype("float32"))
            for s in tqdm(smiles, desc="reading molecules", disable=not slow)]).log1p()

    def forward(self, features):                                         # (B, bits)
        pooled = self.pool(features)                                     # (B, E)
        return pooled, self.split(F.silu(pooled)).unflatten(1, (self.tokens, -1))  # (B, L, D)


MOLECULE_ENCODERS = {"fingerprint": Fingerprint}


# --- the conditioner ------------------------------------------------------------------------------

def sinusoid(t, dim=256, period=10_000):
    """The timestep's own sinusoid (as in unet.py): [0, 1000] to (B, dim), cosines first."""
    frequency = torch.exp(-math.log(period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], 1)


class NumberEncoder(nn.Module):
    """Sinusoid of a number in [0, 1000], then an MLP of its own."""

    def __init__(self, embedding):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, embedding), nn.SiLU(),
                                 nn.Linear(embedding, embedding))

    def forward(self, value):
        return self.mlp(sinusoid(value))


class Conditioner(nn.Module):
    """Fields to a vector (B, E), tokens (B, L, D) and a token mask (B, L).

    vector = sum over groups of gain_g * LayerNorm(sum over the group's fields of e_f), where e_f
    is the field's embedding if it is kept and the field's learned null if not.
    """

    def __init__(self, fields, embedding, token, molecule_encoder="fingerprint"):
        super().__init__()
        self.fields, self.encoder_name = fields, molecule_encoder
        self.groups = list(dict.fromkeys(f.group for f in fields))
        # in the order of fields and groups: a column may have any name, a module may not
        self.encoders = nn.ModuleList(self.encoder_of(f, embedding, token) for f in fields)
        self.null = nn.Parameter(torch.randn(len(fields), embedding) * .02)
        self.gain = nn.Parameter(torch.ones(len(self.groups), embedding))
        self.null_token = nn.Parameter(torch.randn(1, 1, token) * .02)
        self.empty = nn.Parameter(torch.zeros(embedding), requires_grad=False)

    def encoder_of(self, field, embedding, token):
        if field.kind == "molecule":
            return MOLECULE_ENCODERS[self.encoder_name](embedding, token)
        if field.kind == "category":
            return nn.Embedding(len(field.vocabulary), embedding)
        return NumberEncoder(embedding)

    def encode(self, columns, n):
        """Strings {name: [n values]} to codes {name: tensor} and known (n, fields).

        A column that is missing is unknown. A molecule's code is its place in `molecules[name]`,
        its features (M, ...), one row for each distinct SMILES. Returns (codes, known, molecules).
        """
        codes, known, molecules = {}, torch.zeros(n, len(self.fields), dtype=torch.bool), {}
        for i, field in enumerate(self.fields):
            values = columns.get(field.name, [""] * n)
            if field.kind == "molecule":
                distinct = sorted(set(values) - {""}) or ["C"]
                for smiles in distinct:
                    if parse_smiles(smiles) is None:
                        raise FieldError(f"{field.name}={smiles}: no valid SMILES")
                place = {s: k for k, s in enumerate(distinct)} | {"": 0}
                codes[field.name] = torch.tensor([place[v] for v in values])
                known[:, i] = torch.tensor([v != "" for v in values])
                molecules[field.name] = self.encoders[i].featurise(distinct)
            else:
                codes[field.name], known[:, i] = field.encode(values)
        return codes, known, molecules

    def parts(self, codes, keep, molecules):
        """Each group's normalised part of the vector, {group: (B, E)}, and the molecule tokens."""
        sums = {group: 0. for group in self.groups}
        tokens, mask = [self.null_token.expand(len(keep), -1, -1)], [torch.ones_like(keep[:, :1])]
        for i, field in enumerate(self.fields):
            kept, code = keep[:, i:i + 1], codes[field.name]
            if field.kind == "molecule":
                e, t = self.encoders[i](molecules[field.name][code])
                tokens.append(t)
                mask.append(kept.expand(-1, t.shape[1]))
            else:
                e = self.encoders[i](code)
            sums[field.group] = sums[field.group] + torch.where(kept, e, self.null[i])
        parts = {group: gain * F.layer_norm(total, total.shape[-1:])
                 for gain, (group, total) in zip(self.gain, sums.items())}
        return parts, torch.cat(tokens, 1), torch.cat(mask, 1)

    def forward(self, codes, keep, molecules):
        """codes {name: (B,)}, keep (B, fields) bool, molecules {name: (M, ...)} as from encode."""
        parts, tokens, mask = self.parts(codes, keep, molecules)
        vector = sum(parts.values(), self.empty.expand(len(keep), -1))
        return vector, tokens, mask            # (B, E), (B, L, D), (B, L); one null token stays


# --- what is dropped in training ------------------------------------------------------------------

def draw_keep(fields, n, rng, single=.2, each=.3):
    """The dropout plan: which fields each of n samples is shown, (n, fields) bool.

    First the branch: everything 0.7, nothing 0.1, and 0.2 shared by the other subsets of groups
    (with two groups: biology only 0.1, experiment only 0.1). Then, in a share `single` of the
    samples, each kept field is dropped on its own with probability `each`, so that any subset may
    be asked for. Independent dropping would leave the full condition to few samples.
    """
    groups = list(dict.fromkeys(f.group for f in fields))
    subsets = [s for s in itertools.product((True, False), repeat=len(groups))
               if any(s) and not all(s)]
    shares = [.7 if subsets else .9, .1] + [.2 / len(subsets) for _ in subsets]
    table = torch.tensor([[True] * len(groups), [False] * len(groups), *subsets], dtype=torch.bool)
    branch = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=rng)
    keep = table[branch][:, [groups.index(f.group) for f in fields]]
    alone = torch.rand(n, 1, generator=rng) < single
    return keep & ~(alone & (torch.rand(n, len(fields), generator=rng) < each))


def hide_molecule_of_controls(fields, codes, keep, molecules, rng, share=.5):
    """At dose 0 the molecule cannot matter: show half of the controls with a random molecule.

    So a dose sweep from 0 stays inside what was learned. A control is a sample that is *shown* a
    log field at 0: where the dose is hidden or unknown, another molecule would be a lie.
    keep (n, fields) bool. Returns codes with some molecule places replaced.
    """
    shown_zero = [keep[:, i] & (codes[f.name] == 0) for i, f in enumerate(fields)
                  if f.kind == "log"]
    if not shown_zero:
        return codes
    control, codes, n = torch.stack(shown_zero).any(0), dict(codes), len(keep)
    for field in fields:
        if field.kind == "molecule":
            swap = control & (torch.rand(n, generator=rng) < share).to(control.device)
            other = torch.randint(len(molecules[field.name]), (n,), generator=rng)
            codes[field.name] = torch.where(swap, other.to(control.device), codes[field.name])
    return codes


def blank_unseen(fields, columns):
    """Columns {name: strings} with categories that training never saw made blank: unknown."""
    seen = {f.name: {*f.vocabulary, ""} for f in fields if f.kind == "category"}
    return {name: [v if name not in seen or v in seen[name] else "" for v in values]
            for name, values in columns.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = {"smiles": ["CCO", "c1ccccc1O", "CS(C)=O"], "dose": ["1", "10", "0"],
            "batch": ["B1", "B2", ""]}
    fields = parse_fields({"biology": ["smiles", "dose"], "experiment": ["batch"]}, rows)
    fields = [f.fit(rows[f.name]) for f in fields]
    conditioner = Conditioner(fields, embedding=64, token=32)
    codes, known, molecules = conditioner.encode(rows, 3)
    keep = known & draw_keep(fields, 3, torch.Generator().manual_seed(1))
    parts, _, mask = conditioner.parts(codes, keep, molecules)
    for i in range(3):
        shown = [f.name for j, f in enumerate(fields) if keep[i, j]]
        norms = ", ".join(f"|{g}| {p[i].norm():.2f}" for g, p in parts.items())
        print(f"row {i}: shown {', '.join(shown) or 'nothing'}; {norms}; "
              f"{int(mask[i].sum())} tokens")
    share = draw_keep(fields, 100_000, torch.Generator().manual_seed(0)).float().mean(0)
    print("share of samples that see", {f.name: round(s.item(), 3) for f, s in zip(fields, share)})
