"""Metadata and molecules to what the U-Net receives: a vector, and tokens for cross-attention.

A field is a metadata column with a kind (molecule, number, log, category) and a group (biology or
experiment). As in DiffusionSat (Khanna et al. 2024, arXiv:2312.03606) a number is scaled to the
timestep's range, goes through the timestep's sinusoid and an MLP of its own, and is added to the
timestep embedding. Unlike there, absence is a learned null and not the legal value 0, each group
is mixed by an MLP and normalised, and the combinations that guidance needs are trained on purpose
(`draw_keep`).

    python conditioning.py      # which fields are dropped how often, and the size of each part
"""
import argparse
import functools
import itertools
import math
import os
import re
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field as dataclass_field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from rdkit import Chem, RDLogger
from rdkit.Chem import Descriptors, rdFingerprintGenerator
from rdkit.ML.Descriptors.MoleculeDescriptors import MolecularDescriptorCalculator
from tqdm import tqdm

RDLogger.DisableLog("rdApp.*")
KINDS = ("molecule", "number", "log", "category")
OUTCOMES = ("true_", "n_nuclei", "img_cnt_cells")  # measured from the image: telling them leaks it


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
        codes = {value: self.code(value) for value in dict.fromkeys(values)}
        dtype = torch.long if self.kind == "category" else torch.float32
        return (torch.tensor([codes[v] for v in values], dtype=dtype),
                torch.tensor([v != "" for v in values]))

    def code(self, value):
        if value == "":
            return 0
        if self.kind != "category":
            return self.scale(parse_number(self.name, value))
        if value not in self.vocabulary:
            raise FieldError(f"unknown {self.name} {value}: known are "
                             + ", ".join(self.vocabulary))
        return self.vocabulary.index(value)


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


def is_smiles(text):
    return parse_smiles(text) is not None


def parse_fields(groups, columns, is_molecule=is_smiles):
    """Field specifications to Fields, not fitted yet.

    groups: {group: ["smiles:molecule", "dose", ...]}, the kind optional where it can be told.
    columns: {name: list of strings}. is_molecule: the molecule encoder's, which may take other
    texts than SMILES. All faults are reported together.
    """
    fields, faults = [], []
    for group, specifications in groups.items():
        for specification in specifications:
            name, _, kind = specification.partition(":")
            try:
                check_name(name, columns, [f.name for f in fields])
                field = Field(name, kind or guess_kind(name, columns), group)
                check_values(field, columns[name], is_molecule)
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
    if not any(columns[name]):
        raise FieldError(f"column {name} is blank in every row")
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
    if name.lower().removeprefix("metadata_").startswith(OUTCOMES):
        raise FieldError(f"field {name} is an outcome, measured from the image: as a condition it "
                         "would give the answer away")
    if name not in columns:
        raise FieldError(f"no column {name}: the manifest has {', '.join(columns)} (fields are "
                         "named by --biology and --experiment)")
    if name in earlier:
        raise FieldError(f"field {name} is given twice")


def check_values(field, values, is_molecule=is_smiles):
    """Refuse unknown kinds and values that do not fit the kind; each row is named."""
    if field.kind not in KINDS:
        raise FieldError(f"field {field.name}: unknown kind {field.kind}, one of "
                         + ", ".join(KINDS))
    fits, complaint = {
        "molecule": (is_molecule, "is no valid SMILES"),
        "number": (is_number, "is not a number"),
        "log": (lambda v: is_number(v) and float(v) >= 0, "is not a number of at least 0"),
        "category": (lambda v: v.lower() != "nan", "is no category: leave what is unknown blank")
    }[field.kind]
    bad = {v for v in set(values) if v != "" and not fits(v)}
    faults = [f"row {i + 2}, column {field.name}: {v} {complaint}" for i, v in enumerate(values)
              if v in bad]
    if faults:
        more = [f"and {len(faults) - 10} more rows"] if len(faults) > 10 else []
        raise FieldError("\n".join(faults[:10] + more))


@contextmanager
def of_manifest(path):
    """Faults of rows that are found inside name the manifest."""
    try:
        yield
    except FieldError as fault:
        raise FieldError("\n".join(f"{path}, {line}" if line.startswith(("row ", "column "))
                                   else line for line in str(fault).splitlines())) from None


# --- molecule encoders ----------------------------------------------------------------------------
#
# An encoder has `fit`, what it learns from the training molecules or is told by an option (a dict
# that travels in the checkpoint); `featurise`, done once per molecule; and `forward`, at every
# step: features (B, ...) to a pooled vector (B, E), tokens (B, L, D) and which tokens count (B, L).

def parse_smiles(text):
    """SMILES to an RDKit molecule; None if it is none. A ChemAxon tail (` |c:5|`) is cut off, and
    of a salt only the largest part is kept: the counter-ion does not act on cells."""
    words = text.split()
    molecule = Chem.MolFromSmiles(words[0]) if words else None
    if molecule is not None and "." in words[0]:
        molecule = max(Chem.GetMolFrags(molecule, asMols=True), key=lambda part: (
            part.GetNumHeavyAtoms(), Chem.MolToSmiles(part)))  # whatever the order in the text
    return molecule


@functools.lru_cache(2)  # an encoder is fitted to the molecules that it featurises next
def each_molecule(function, smiles):
    """[function(molecule) for each of a tuple of SMILES]; many are shared by all cores, with a
    progress bar."""
    if len(smiles) < 2000:
        return [function(parse_smiles(s)) for s in smiles]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, map(parse_smiles, smiles), chunksize=64),
                         desc="reading molecules", total=len(smiles)))


def mlp(cin, hidden, cout):
    return nn.Sequential(nn.Linear(cin, hidden), nn.SiLU(), nn.Linear(hidden, cout))


class Encoder(nn.Module):
    """An encoder of fixed vectors: an MLP, and a few tokens split from its output."""
    tokens = 4
    is_molecule = staticmethod(is_smiles)

    def __init__(self, settings, embedding, token):
        super().__init__()
        self.settings = settings
        self.build(embedding, token)

    def build(self, embedding, token):
        self.pool = mlp(self.width(), embedding, embedding)
        self.split = nn.Linear(embedding, self.tokens * token)

    @staticmethod
    def fit(smiles, options):
        """Settings from the training molecules and {option: value}, ready for JSON."""
        return {}

    def scale(self, features):
        return features

    def forward(self, features):                                         # (B, width)
        pooled = self.pool(self.scale(features))                         # (B, E)
        tokens = self.split(F.silu(pooled)).unflatten(1, (self.tokens, -1))
        return pooled, tokens, torch.ones_like(tokens[:, :, 0], dtype=torch.bool)


class Fingerprint(Encoder):
    """Morgan counts (Rogers & Hahn 2010), `radius` bonds around each atom, folded to `bits`."""

    @staticmethod
    def fit(smiles, options):
        return {"bits": int(options.get("bits", 2048)), "radius": int(options.get("radius", 2))}

    def width(self):
        return self.settings["bits"]

    def featurise(self, smiles):
        """(M, bits): log1p of how often each fragment occurs; chirality and charge are seen."""
        generator = rdFingerprintGenerator.GetMorganGenerator(
            radius=self.settings["radius"], fpSize=self.settings["bits"], includeChirality=True)
        counts = [generator.GetCountFingerprintAsNumPy(parse_smiles(s)) for s in tqdm(
            smiles, desc="reading molecules", disable=len(smiles) < 2000)]
        return torch.from_numpy(np.stack(counts).astype("float32")).log1p()

    def scale(self, features):
        # few bits are set: to length sqrt(bits), so that the first layer sees unit-sized input
        return F.normalize(features, dim=-1) * features.shape[-1] ** .5


def column_statistics(values):
    """Mean and deviation of each column of (M, width), ready for JSON; not finite: left out."""
    values = np.where(np.isfinite(values), values, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column that is nowhere finite has no mean
        mean, std = np.nanmean(values, 0), np.nanstd(values, 0)
    return {"mean": np.nan_to_num(mean).tolist(), "std": np.where(std > 1e-6, std, 1.).tolist()}


class Standardised(Encoder):
    """An encoder of vectors that are standardised on the training molecules, not finite: the mean,
    and clipped to five deviations."""

    def width(self):
        return len(self.settings["mean"])

    def standardise(self, values):
        values = (np.array(values) - self.settings["mean"]) / self.settings["std"]
        return torch.from_numpy(np.nan_to_num(values, posinf=0, neginf=0)).float().clamp(-5, 5)


# all but the score of drug-likeness: a function of the others that takes a third of the time
DESCRIPTORS = MolecularDescriptorCalculator([n for n, _ in Descriptors.descList if n != "qed"])


def calculate_descriptors(molecule):
    return DESCRIPTORS.CalcDescriptors(molecule, missingVal=math.nan)


class DescriptorEncoder(Standardised):
    """RDKit's two hundred descriptors (weight, polar area, charges, counts of fragments ...).
    Blind to handedness."""

    @staticmethod
    def fit(smiles, options):
        return column_statistics(np.array(each_molecule(calculate_descriptors, tuple(smiles)),
                                          float))

    def featurise(self, smiles):                                         # (M, descriptors)
        return self.standardise(each_molecule(calculate_descriptors, tuple(smiles)))


class Table(Standardised):
    """Vectors of any other encoder, from an .npz (--molecule_table) keyed by SMILES or InChIKey.
    Those of the training molecules travel in the checkpoint; others are looked up in the file.
    A text that is no SMILES is looked up as it stands: a gene, say."""

    @staticmethod
    def fit(smiles, options):
        if not options.get("table"):
            raise FieldError("the molecule encoder table needs --molecule_table FILE.npz")
        vectors = read_table(options["table"], smiles)
        return {"table": str(options["table"]), "example": smiles[0],
                "vectors": {key: vector.tolist() for key, vector in vectors.items()},
                **column_statistics(np.stack(list(vectors.values())))}

    @staticmethod
    def is_molecule(text):
        return True  # or `fit` names it as missing

    def featurise(self, smiles):                                         # (M, width)
        known = self.settings["vectors"]
        new = [s for s in smiles if molecule_key(s) not in known]
        known = known | (read_table(self.settings["table"], new, self.width()) if new else {})
        return self.standardise([known[molecule_key(s)] for s in smiles])


def molecule_key(smiles):
    molecule = parse_smiles(smiles)
    return Chem.MolToInchiKey(molecule) if molecule else smiles


def read_table(path, smiles, width=None):
    """{molecule_key: vector (width,)} of these molecules; all that are missing are named."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {}
            for s in smiles:
                molecule = parse_smiles(s)
                ways = (s, Chem.MolToSmiles(molecule) if molecule else s, molecule_key(s))
                name = next((way for way in ways if way in archive), None)
                found[s] = None if name is None else archive[name].astype("float64")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as fault:
        raise FieldError(f"{path} is no table of vectors (.npz keyed by SMILES, InChIKey or name): "
                         f"{fault}") from None
    missing = [s for s, vector in found.items() if vector is None]
    if missing:
        raise FieldError(f"{path} has no vector for {len(missing)} molecules: "
                         + ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""))
    shape = (width,) if width else next(iter(found.values())).shape
    bad = [s for s, v in found.items()
           if v.ndim != 1 or v.shape != shape or not np.isfinite(v).all()]
    if bad:
        raise FieldError(f"{path}: the vector of {bad[0]} is not {shape[0] if shape else 1} finite "
                         "numbers, as the others are")
    return {molecule_key(s): vector for s, vector in found.items()}


class Identity(Encoder):
    """One vector for each training molecule, one for all that are unseen: what an encoder that
    knows nothing of structure can do. It cannot generalise, and is there to show that."""

    @staticmethod
    def fit(smiles, options):
        return {"known": sorted({molecule_key(s) for s in smiles})}

    def build(self, embedding, token):
        self.vectors = nn.Embedding(len(self.settings["known"]) + 1, embedding)  # 0: unseen
        self.split = nn.Linear(embedding, self.tokens * token)

    def featurise(self, smiles):
        place = {key: i + 1 for i, key in enumerate(self.settings["known"])}
        return torch.tensor([place.get(molecule_key(s), 0) for s in smiles])

    def pool(self, place):                                               # (B,)
        return self.vectors(place)


BONDS = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "AROMATIC": 4}   # 5, 6: a double bond, E or Z
ATOM_FEATURES = 6


def read_graph(molecule):
    """Atoms (A, 6: element, charge, hydrogens, handedness, aromatic, ring), bonds (A, A)."""
    Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
    hand = {"R": 1, "S": 2}
    atoms = [[min(a.GetAtomicNum(), 99), a.GetFormalCharge() % 8, min(a.GetTotalNumHs(), 7),
              hand.get(a.GetPropsAsDict(True, True).get("_CIPCode"), 0), a.GetIsAromatic(),
              a.IsInRing()] for a in molecule.GetAtoms()]
    bonds = np.zeros((len(atoms), len(atoms)), np.int64)
    for bond in molecule.GetBonds():
        kind = {"STEREOE": 5, "STEREOZ": 6}.get(str(bond.GetStereo()),
                                                BONDS.get(str(bond.GetBondType()), 1))
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = bonds[j, i] = kind
    return np.array(atoms, np.int64), bonds


class Graph(Encoder):
    """Message passing over atoms and bonds: a graph isomorphism network (Xu et al. 2019,
    arXiv:1810.00826) with one weight per type of bond. Chosen over directed-bond messages (D-MPNN)
    because its states live on atoms, which are the tokens. Handedness and E/Z enter by their
    labels, so neither depends on the order of atoms."""
    rounds, hidden = 4, 128

    def build(self, embedding, token):
        self.atom = nn.ModuleList(nn.Embedding(n, self.hidden) for n in (100, 8, 8, 3, 2, 2))
        self.bond = nn.ModuleList(nn.Linear(self.hidden, 6 * self.hidden)
                                  for _ in range(self.rounds))
        self.update = nn.ModuleList(mlp(self.hidden, 2 * self.hidden, self.hidden)
                                    for _ in range(self.rounds))
        self.pool = mlp(self.hidden, embedding, embedding)
        self.split = nn.Linear(self.hidden, token)

    def featurise(self, smiles):
        """(M, A, 6 + A): the atoms' features plus one (0: no atom), and their bonds."""
        graphs = each_molecule(read_graph, tuple(smiles))
        size = max(len(atoms) for atoms, _ in graphs)
        packed = np.zeros((len(graphs), size, ATOM_FEATURES + size), np.uint8)
        for row, (atoms, bonds) in zip(packed, graphs):
            row[:len(atoms), :ATOM_FEATURES] = atoms
            row[:len(atoms), 0] += 1
            row[:len(atoms), ATOM_FEATURES:ATOM_FEATURES + len(atoms)] = bonds
        return torch.from_numpy(packed)

    def forward(self, graph):                                            # (B, A, 6 + A)
        graph = graph.long()
        there = graph[:, :, 0] > 0                                       # (B, A)
        element = (graph[:, :, 0] - 1).clamp(min=0)
        codes = [element, *graph[:, :, 1:ATOM_FEATURES].unbind(2)]
        h = sum(table(code) for table, code in zip(self.atom, codes))    # (B, A, hidden)
        bonds = F.one_hot(graph[:, :, ATOM_FEATURES:], 7)[..., 1:].to(h)  # (B, A, A, 6)
        for messages, update in zip(self.bond, self.update):
            sent = messages(h).unflatten(2, (6, self.hidden))            # (B, A, 6, hidden)
            h = h + update(F.layer_norm(h + torch.einsum("bijk,bjkc->bic", bonds, sent),
                                        h.shape[-1:]))
        h = h * there[..., None]
        pooled = self.pool(F.layer_norm(h.sum(1), h.shape[-1:]))         # (B, E)
        return pooled, self.split(h), there                              # tokens are atoms


SMILES_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")


class SmilesTransformer(Encoder):
    """A small transformer over the tokens of SMILES. In training each molecule is spelt at random
    in one of several ways (Bjerrum 2017, arXiv:1703.07076), otherwise in the canonical one."""
    spellings, longest, width_, layers = 8, 96, 128, 2

    @staticmethod
    def fit(smiles, options):
        return {"vocabulary": sorted({token for s in smiles for spelling in spell(s, 8)
                                      for token in SMILES_TOKEN.findall(spelling)})}

    def build(self, embedding, token):
        words = len(self.settings["vocabulary"]) + 2                     # 0 none, 1 unknown
        self.embed = nn.Embedding(words, self.width_)
        self.place = nn.Parameter(torch.randn(self.longest, self.width_) * .02)
        layer = nn.TransformerEncoderLayer(self.width_, 4, 2 * self.width_, 0., "gelu",
                                           batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        self.pool = mlp(self.width_, embedding, embedding)
        self.split = nn.Linear(self.width_, token)

    def featurise(self, smiles):
        """(M, spellings, longest): places in the vocabulary; the first spelling is canonical."""
        place = {t: i + 2 for i, t in enumerate(self.settings["vocabulary"])}
        packed = torch.zeros(len(smiles), self.spellings, self.longest, dtype=torch.long)
        for row, s in zip(packed, smiles):
            for line, spelling in zip(row, spell(s, self.spellings)):
                codes = [place.get(t, 1) for t in SMILES_TOKEN.findall(spelling)][:self.longest]
                line[:len(codes)] = torch.tensor(codes)
        longest = int((packed > 0).sum(2).max())
        return packed[:, :, :longest]

    def forward(self, spellings):                                        # (B, spellings, L)
        n = len(spellings)
        chosen = (torch.randint(self.spellings, (n,)) if self.training
                  else torch.zeros(n, dtype=torch.long)).to(spellings.device)
        codes = spellings[torch.arange(n, device=spellings.device), chosen]
        there = codes > 0                                                # (B, L)
        h = self.embed(codes) + self.place[:codes.shape[1]]
        h = self.body(h, src_key_padding_mask=~there)                    # (B, L, width)
        h = h * there[..., None]
        pooled = self.pool(h.sum(1) / there.sum(1, keepdim=True).clamp(min=1))
        return pooled, self.split(h), there


def spell(smiles, ways):
    """A molecule's canonical SMILES, then `ways` - 1 random but reproducible spellings of it."""
    molecule = parse_smiles(smiles)
    canonical = Chem.MolToSmiles(molecule)
    return [canonical, *Chem.MolToRandomSmilesVect(molecule, ways - 1, randomSeed=1)]


MOLECULE_ENCODERS = {"fingerprint": Fingerprint, "descriptors": DescriptorEncoder, "graph": Graph,
                     "smiles": SmilesTransformer, "table": Table, "identity": Identity}


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
        self.mlp = mlp(256, embedding, embedding)

    def forward(self, value):
        return self.mlp(sinusoid(value))


class Conditioner(nn.Module):
    """Fields to a vector (B, E), tokens (B, L, D) and a token mask (B, L).

    vector = sum over groups of gain_g * LayerNorm(u_g + MLP_g(u_g)), u_g = sum over the group's
    fields of LayerNorm(e_f), or of the field's learned null where it is not kept. The norm of each
    field and group keeps any from drowning another; the MLP lets the fields of a group act
    together, as a dose acts through its molecule.
    """

    def __init__(self, fields, embedding, token, molecule_encoder="fingerprint",
                 molecule_settings=None):
        super().__init__()
        self.fields, self.encoder_class = fields, MOLECULE_ENCODERS[molecule_encoder]
        self.molecule_settings = molecule_settings or self.encoder_class.fit([], {})
        self.groups = list(dict.fromkeys(f.group for f in fields))
        # in the order of fields and groups: a column may have any name, a module may not
        self.encoders = nn.ModuleList(self.encoder_of(f, embedding, token) for f in fields)
        self.null = nn.Parameter(torch.randn(len(fields), embedding) * .02)
        self.mix = nn.ModuleList(mlp(embedding, 2 * embedding, embedding) for _ in self.groups)
        self.gain = nn.Parameter(torch.ones(len(self.groups), embedding))
        self.null_token = nn.Parameter(torch.randn(1, 1, token) * .02)
        self.empty = nn.Parameter(torch.zeros(embedding), requires_grad=False)

    def encoder_of(self, field, embedding, token):
        if field.kind == "molecule":
            return self.encoder_class(self.molecule_settings, embedding, token)
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
                # where no molecule is known, any that can be encoded stands in; it is not shown
                example = self.molecule_settings.get("example", "C")
                distinct = sorted(set(values) - {""}) or [example]
                for smiles in distinct:
                    if not self.encoder_class.is_molecule(smiles):
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
        tokens = [self.null_token.expand(len(keep), -1, -1)]
        mask = [torch.ones(len(keep), 1, dtype=torch.bool, device=keep.device)]
        for i, field in enumerate(self.fields):
            kept, code = keep[:, i:i + 1], codes[field.name]
            if field.kind == "molecule":
                e, t, there = self.encoders[i](molecules[field.name][code])
                tokens.append(t)
                mask.append(kept & there)
            else:
                e = self.encoders[i](code)
            e = F.layer_norm(e, e.shape[-1:])
            sums[field.group] = sums[field.group] + torch.where(kept, e, self.null[i])
        parts = {group: gain * F.layer_norm(u + mix(u), u.shape[-1:])
                 for gain, mix, (group, u) in zip(self.gain, self.mix, sums.items())}
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

    So a dose sweep from 0 stays inside what was learned. A control is a sample that is *shown*
    all its doses (dose_fields) at 0: where one is hidden or unknown, another molecule would be a
    lie. keep (n, fields) bool. Returns codes with some molecule places replaced.
    """
    doses = [keep[:, fields.index(f)] & (codes[f.name] == 0) for f in dose_fields(fields)]
    if not doses:
        return codes
    control, codes, n = torch.stack(doses).all(0), dict(codes), len(keep)
    for field in fields:
        if field.kind == "molecule":
            swap = control & (torch.rand(n, generator=rng) < share).to(control.device)
            other = torch.randint(len(molecules[field.name]), (n,), generator=rng)
            codes[field.name] = torch.where(swap, other.to(control.device), codes[field.name])
    return codes


def treatment_group(fields):
    """The group that says what was done to the cells: that of the first molecule, or dose."""
    return next((f.group for kind in ("molecule", "log") for f in fields if f.kind == kind), None)


def dose_fields(fields):
    """The fields that are 0 for a negative control: log fields named dose or conc in the molecule's
    group; else its log fields; else those of that name in any group. May be none."""
    logs = [f for f in fields if f.kind == "log"]
    named = [f for f in logs if f.name.lower().startswith(("dose", "conc"))]
    ours = [f for f in logs if f.group == treatment_group(fields)]
    return [f for f in named if f in ours] or ours or named


def blank_unseen(fields, columns):
    """Columns {name: strings} with categories that training never saw made blank: unknown."""
    seen = {f.name: {*f.vocabulary, ""} for f in fields if f.kind == "category"}
    return {name: [v if name not in seen or v in seen[name] else "" for v in values]
            for name, values in columns.items()}


# --- what was dropped, and the embedding's parts, to be seen --------------------------------------

def show():
    """One request under every subset of fields that training draws: how often it comes, and the
    size of what the U-Net receives."""
    torch.manual_seed(0)
    wells = {"smiles": ["CCO", "CS(C)=O"], "dose": ["10", "0"], "batch": ["B1", "B2"]}
    fields = [f.fit(wells[f.name]) for f in parse_fields(
        {"biology": ["smiles", "dose"], "experiment": ["batch"]}, wells)]
    conditioner = Conditioner(fields, embedding=64, token=32)
    drawn = draw_keep(fields, 100_000, torch.Generator().manual_seed(0))
    subsets, counts = drawn.unique(dim=0, return_counts=True)
    n = len(subsets)
    codes, _, molecules = conditioner.encode({k: v[:1] * n for k, v in wells.items()}, n)
    parts, _, mask = conditioner.parts(codes, subsets, molecules)
    vector, _, _ = conditioner(codes, subsets, molecules)
    other, _, _ = conditioner(codes | {"dose": codes["dose"] / 2}, subsets, molecules)
    print("".join(f"{f.name:9s}" for f in fields)
          + "share  |biology|  |experiment|  |vector|  tokens  moved by another dose")
    for i in counts.argsort(descending=True):
        shown = "".join(f"{wells[f.name][0] if kept else 'dropped':9s}"
                        for f, kept in zip(fields, subsets[i]))
        print(f"{shown}{counts[i] / len(drawn):.3f}{parts['biology'][i].norm():11.2f}"
              f"{parts['experiment'][i].norm():14.2f}{vector[i].norm():10.2f}"
              f"{mask[i].sum():8d}{(other - vector)[i].norm():12.2f}")
    print("each group's part has length sqrt(64) = 8, so that none drowns another; one null token "
          "stays")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show()
