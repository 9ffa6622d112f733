"""Metadata and molecules to what the U-Net receives: a vector, and tokens for cross-attention.

A field is a metadata column with a kind and a group (biology or experiment). As in DiffusionSat
(Khanna et al. 2024, arXiv:2312.03606) a number is scaled to the timestep's range, goes through the
timestep's sinusoid and an MLP of its own, and is added to the timestep embedding. Unlike there,
absence is a learned null and not the legal value 0, each group is mixed by an MLP and normalised,
and the combinations that guidance needs are trained on purpose (`draw_keep`).
"""
import functools
import itertools
import math
import re
import zipfile
from concurrent.futures import ProcessPoolExecutor
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
OUTCOMES = ("true_", "n_nuclei", "img_cnt_cells")  # measured from the image: telling them leaks it


class FieldError(ValueError):
    """Faults in the fields or in a request, one line each."""


# --- fields: what each column means, learned from the training rows ------------------------------

@dataclass
class Field:
    """One condition. `low`, `high` and `vocabulary` are learned by `fit` from training rows."""
    name: str
    kind: str           # molecule, number, log or category
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

    def clip(self, value):
        """The number nearest to `value` in the range of the training rows, dose 0 included."""
        return min(max(value, 0. if self.kind == "log" else self.low), self.high)

    def scale(self, value):
        """A number, clipped, to the timestep's range [0, 1000]. A log field is log1p(dose /
        smallest positive training dose), so that dose 0 is legal and is 0."""
        value = self.clip(value)
        if self.kind == "log":
            return 1000 * math.log1p(value / self.low) / math.log1p(self.high / self.low)
        return 1000 * (value - self.low) / ((self.high - self.low) or 1.)

    def encode(self, values):
        """Strings to codes (N,) and a mask (N,) of what is known. A number is scaled; a category is
        its place in the vocabulary; molecules are encoded by `Conditioner`."""
        codes, category = {"": 0}, self.kind == "category"
        for value in dict.fromkeys(v for v in values if v != ""):
            if category and value not in self.vocabulary:
                raise FieldError(f"unknown {self.name} {value}: known are "
                                 + ", ".join(self.vocabulary))
            codes[value] = (self.vocabulary.index(value) if category
                            else self.scale(parse_number(self.name, value)))
        codes = torch.tensor([codes[v] for v in values])
        return (codes if category else codes.float()), torch.tensor([v != "" for v in values])


def natural(text):
    """Sort key that puts B10 after B2: text and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))]


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def parse_number(name, text):
    """The number of a request NAME=TEXT; FieldError where it is none."""
    if not is_number(text):
        raise FieldError(f"{name}={text}: not a finite number")
    return float(text)


def parse_smiles(text):
    """SMILES to an RDKit molecule; None if it is none. A ChemAxon tail (` |c:5|`) is cut off, and
    of a salt only the largest part is kept: the counter-ion does not act on cells."""
    words = text.split()
    molecule = Chem.MolFromSmiles(words[0]) if words else None
    if molecule is not None and "." in words[0]:
        molecule = max(Chem.GetMolFrags(molecule, asMols=True), key=lambda part: (
            part.GetNumHeavyAtoms(), Chem.MolToSmiles(part)))  # whatever the order in the text
    return molecule


def is_smiles(text):
    return parse_smiles(text) is not None


def parse_fields(groups, columns, is_molecule=is_smiles, path=""):
    """Field specifications to Fields, not fitted yet.

    groups: {group: ["smiles:molecule", "dose", ...]}, the kind optional where it can be told.
    columns: {name: list of strings} of the manifest at `path`. is_molecule: the molecule encoder's,
    which may take other texts than SMILES. All faults are raised together as one FieldError.
    """
    fields = []
    for group, specifications in groups.items():
        for name, _, kind in (text.partition(":") for text in specifications):
            fields.append(Field(name, kind or guess_kind(name, columns.get(name, ())), group))
    check_columns(fields, columns, is_molecule, path)
    return fields


def guess_kind(name, values):
    """The kind that a column's name or text tells; "" where it has to be said."""
    if name.lower() == "smiles":
        return "molecule"
    if name.lower().startswith(("dose", "conc")):
        return "log"
    return "category" if any(v != "" and not is_number(v) for v in values) else ""


def check_columns(fields, columns, is_molecule=is_smiles, path=""):
    """Refuse columns {name: strings} that lack a field or have unsound values of one. All faults
    are raised together as one FieldError."""
    names = [f.name for f in fields]
    lines = [f"field {n} is given twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    for field in fields:
        lines += faults(field, columns, is_molecule, f"{path}, " if path else "")
    if lines:
        raise FieldError("\n".join(lines))


def faults(field, columns, is_molecule, where):
    """What is wrong with the column of a field, a line each; of rows at most ten. Rows are counted
    as in a spreadsheet, where the header is row 1."""
    name, values = field.name, columns.get(field.name)
    if name.lower().removeprefix("metadata_").startswith(OUTCOMES):
        return [f"field {name} is an outcome: as a condition it would give the answer away"]
    if values is None:
        return [f"{where}no column {name}: there are {', '.join(columns)} (--biology and "
                "--experiment name the fields of a model)"]
    if not field.kind:
        return [f"{where}column {name} " + (f"holds numbers: write {name}:category or {name}:number"
                                            if any(values) else "is blank in every row")]
    fits, complaint = {
        "molecule": (is_molecule, "is no valid SMILES"),
        "number": (is_number, "is not a number"),
        "log": (lambda v: is_number(v) and float(v) >= 0, "is not a number of at least 0"),
        "category": (lambda v: v.lower() != "nan", "is no category: leave what is unknown blank")
    }.get(field.kind, (None, ""))
    if fits is None:
        return [f"field {name}: unknown kind {field.kind}: molecule, number, log or category"]
    unfit = {v for v in set(values) if v != "" and not fits(v)}
    lines = [f"{where}row {i + 2}, column {name}: {v} {complaint}" for i, v in enumerate(values)
             if v in unfit]
    more = [f"{where}column {name}: {len(lines) - 10} more such rows"]
    return lines[:10] + more * (len(lines) > 10)


# --- what the fields say of a manifest's rows -----------------------------------------------------

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


def negative_controls(fields, columns, rows):
    """Those of the rows whose doses (dose_fields) are all known and 0."""
    doses = [columns[f.name] for f in dose_fields(fields)]
    return [i for i in rows if doses and all(d[i] != "" and float(d[i]) == 0 for d in doses)]


def known_columns(fields, columns, rows, hidden=None):
    """{field: values of these rows} without the fields of the group `hidden`; "" (unknown) where
    the column is missing or training never saw the category."""
    known = {}
    for f in (f for f in fields if f.group != hidden):
        seen = set(f.vocabulary)
        values = [columns[f.name][i] if f.name in columns else "" for i in rows]
        known[f.name] = [v if f.kind != "category" or v in seen else "" for v in values]
    return known


def group_mask(fields, groups):
    """Which fields belong to these groups, (fields,) bool: a branch of guidance is such a mask."""
    return torch.tensor([f.group in groups for f in fields], dtype=torch.bool)


# --- molecule encoders ----------------------------------------------------------------------------
#
# An encoder has `fit`, what it learns from the training molecules or is told by an option (a dict
# that travels in the checkpoint); `featurise`, done once for each molecule; and `forward`, at every
# step: features (B, ...) to a pooled vector (B, E), tokens (B, L, D) and which tokens count (B, L).

def each_molecule(function, smiles):
    """[function(text) for each of the SMILES]; many are shared by all cores."""
    if len(smiles) < 2000:
        return [function(s) for s in smiles]
    with ProcessPoolExecutor() as pool:
        return list(tqdm(pool.map(function, smiles, chunksize=64), "molecules", len(smiles)))


def mlp(cin, hidden, cout):
    return nn.Sequential(nn.Linear(cin, hidden), nn.SiLU(), nn.Linear(hidden, cout))


class Encoder(nn.Module):
    """An encoder of fixed vectors: an MLP, and a few tokens split from its output."""
    tokens = 4
    spellings = 1  # rows of `featurise` for each molecule, the canonical spelling first
    is_molecule = staticmethod(is_smiles)

    def __init__(self, settings, embedding, token):
        super().__init__()
        self.settings = settings
        self.build(embedding, token)

    @classmethod
    def fit(cls, smiles, options):
        """Settings from the training molecules and {option: value}, ready for JSON."""
        return {}

    def build(self, embedding, token):
        self.pool = mlp(self.width, embedding, embedding)
        self.split = nn.Linear(embedding, self.tokens * token)

    def forward(self, features):                                         # (B, width)
        pooled = self.pool(features)                                     # (B, E)
        tokens = self.split(F.silu(pooled)).unflatten(1, (self.tokens, -1))
        return pooled, tokens, torch.ones_like(tokens[:, :, 0], dtype=torch.bool)


class Fingerprint(Encoder):
    """Morgan counts (Rogers & Hahn 2010), `radius` bonds around each atom, folded to `bits`."""
    width = property(lambda self: self.settings["bits"])

    @classmethod
    def fit(cls, smiles, options):
        return {"bits": int(options.get("bits", 2048)), "radius": int(options.get("radius", 2))}

    def featurise(self, smiles):
        """(M, bits): log1p of how often each fragment occurs; chirality and charge are seen. Few
        bits are set: to length sqrt(bits), so that the first layer sees unit-sized input."""
        generator = rdFingerprintGenerator.GetMorganGenerator(
            radius=self.settings["radius"], fpSize=self.width, includeChirality=True)
        counts = [generator.GetCountFingerprintAsNumPy(parse_smiles(s)) for s in smiles]
        features = torch.from_numpy(np.stack(counts).astype("float32")).log1p()
        return F.normalize(features, dim=1) * self.width ** .5


class Standardised(Encoder):
    """An encoder of `vectors` that are standardised on the training molecules and clipped to five
    deviations; a number that is not finite becomes the mean."""
    width = property(lambda self: len(self.settings["mean"]))

    @classmethod
    def fit(cls, smiles, options):
        vectors = np.ma.masked_invalid(cls.vectors(smiles, options))
        mean, std = vectors.mean(0).filled(0.), vectors.std(0).filled(0.)
        return {"mean": mean.tolist(), "std": np.where(std > 1e-6, std, 1.).tolist()}

    def featurise(self, smiles):                                         # (M, width)
        x = self.vectors(smiles, self.settings) - np.array(self.settings["mean"])
        x = np.nan_to_num(x / self.settings["std"], posinf=0, neginf=0)
        return torch.from_numpy(x).float().clamp(-5, 5)


# all but the score of drug-likeness: a function of the others that takes a third of the time
CALCULATOR = MolecularDescriptorCalculator([n for n, _ in Descriptors.descList if n != "qed"])


def descriptors_of(smiles):
    return CALCULATOR.CalcDescriptors(parse_smiles(smiles), missingVal=math.nan)


class DescriptorEncoder(Standardised):
    """RDKit's two hundred descriptors (weight, polar area, charges, counts of fragments ...).
    Blind to handedness."""

    @staticmethod
    def vectors(smiles, settings):
        return np.array(each_molecule(descriptors_of, smiles), float)


@functools.cache
def molecule_key(text):
    """InChIKey, the same for every spelling; a text that is no SMILES is its own key."""
    molecule = parse_smiles(text)
    return Chem.MolToInchiKey(molecule) if molecule else text


class Table(Standardised):
    """Vectors of any other encoder, from an .npz (--molecule_table) keyed by SMILES as the manifest
    has them, InChIKey or name (of a gene, say). Those of the training molecules travel in the
    checkpoint; others are looked up in the file."""
    is_molecule = staticmethod(lambda text: True)  # what the table lacks is named by `vectors`

    @classmethod
    def fit(cls, smiles, options):
        if not options.get("table"):
            raise FieldError("the molecule encoder table needs --molecule_table FILE.npz")
        found = add_vectors({}, options["table"], smiles)
        known = {"table": str(options["table"]), "example": smiles[0],
                 "vectors": {key: vector.tolist() for key, vector in found.items()}}
        return known | super().fit(smiles, known)

    @staticmethod
    def vectors(smiles, settings):
        known = add_vectors(settings["vectors"], settings["table"], smiles)
        return np.array([known[molecule_key(s)] for s in smiles])


def add_vectors(known, path, smiles):
    """{molecule_key: vector (width,)}, to which those of these molecules are added from a table."""
    keys = dict(zip(smiles, each_molecule(molecule_key, smiles)))
    new = [s for s in smiles if keys[s] not in known]
    if not new:
        return known
    try:
        with np.load(path, allow_pickle=False) as table:
            known = known | {keys[s]: table[name].astype(float).ravel()
                             for s in new for name in (keys[s], s) if name in table}
        np.stack(list(known.values()) or [[]])  # all of one length
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as fault:
        raise FieldError(f"{path} is no table of vectors of one length (.npz keyed by SMILES, "
                         f"InChIKey or name): {fault}") from None
    missing = [s for s in new if keys[s] not in known]
    if missing:
        raise FieldError(f"{path} has no vector for {len(missing)} molecules: "
                         + ", ".join(missing[:5]) + " ..." * (len(missing) > 5))
    return known


class Identity(Encoder):
    """One vector for each training molecule, one for all that are unseen: what an encoder that
    knows nothing of structure can do. It cannot generalise, and is there to show that."""

    @classmethod
    def fit(cls, smiles, options):
        return {"known": sorted(set(each_molecule(molecule_key, smiles)))}

    def build(self, embedding, token):
        self.vectors = nn.Embedding(len(self.settings["known"]) + 1, embedding)  # 0: unseen
        self.split = nn.Linear(embedding, self.tokens * token)

    def featurise(self, smiles):                                         # (M,)
        place = {key: i + 1 for i, key in enumerate(self.settings["known"])}
        return torch.tensor([place.get(key, 0) for key in each_molecule(molecule_key, smiles)])

    def pool(self, place):                                               # (B,)
        return self.vectors(place)


BONDS = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "AROMATIC": 4, "STEREOE": 5, "STEREOZ": 6}
ATOM_SIZES = (100, 8, 8, 3, 2, 2)  # element, charge, hydrogens, handedness, aromatic, ring


def read_graph(smiles):
    """Atoms (A, 6), the places in ATOM_SIZES, and bonds (A, A), 0 where there is none."""
    molecule = parse_smiles(smiles)
    Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
    hand = {"R": 1, "S": 2}
    atoms = [[min(a.GetAtomicNum(), 99), a.GetFormalCharge() % 8, min(a.GetTotalNumHs(), 7),
              hand.get(a.GetPropsAsDict(True, True).get("_CIPCode"), 0), a.GetIsAromatic(),
              a.IsInRing()] for a in molecule.GetAtoms()]
    bonds = np.zeros((len(atoms), len(atoms)), np.uint8)
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = bonds[j, i] = BONDS.get(str(bond.GetStereo()),
                                              BONDS.get(str(bond.GetBondType()), 1))
    return np.array(atoms, np.uint8), bonds


class Graph(Encoder):
    """Message passing over atoms and bonds: a graph isomorphism network (Xu et al. 2019,
    arXiv:1810.00826) with one weight per type of bond. Its states live on atoms, which are the
    tokens. Handedness and E/Z enter by their labels, so neither depends on the order of atoms."""
    rounds, hidden = 4, 128

    def build(self, embedding, token):
        width = self.hidden
        self.atom = nn.ModuleList(nn.Embedding(n, width) for n in ATOM_SIZES)
        self.bond = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(self.rounds))
        self.update = nn.ModuleList(mlp(width, 2 * width, width) for _ in range(self.rounds))
        self.pool = mlp(width, embedding, embedding)
        self.split = nn.Linear(width, token)

    def featurise(self, smiles):
        """(M, A, 6 + A): the atoms' features, of which the element is 0 for none, and bonds."""
        graphs = each_molecule(read_graph, smiles)
        size = max(len(atoms) for atoms, _ in graphs)
        packed = np.zeros((len(graphs), size, 6 + size), np.uint8)
        for row, (atoms, bonds) in zip(packed, graphs):
            row[:len(atoms), :6 + len(atoms)] = np.concatenate([atoms, bonds], 1)
        return torch.from_numpy(packed)

    def forward(self, graph):                                            # (B, A, 6 + A)
        atoms, bonds = graph.long().tensor_split([6], 2)
        there = atoms[:, :, 0] > 0                                       # (B, A)
        h = sum(table(code) for table, code in zip(self.atom, atoms.unbind(2)))  # (B, A, hidden)
        bonds = F.one_hot(bonds, 7)[..., 1:].to(h)                       # (B, A, A, 6)
        for messages, update in zip(self.bond, self.update):
            sent = messages(h).unflatten(2, (6, self.hidden))            # (B, A, 6, hidden)
            h = h + update(F.layer_norm(h + torch.einsum("bijk,bjkc->bic", bonds, sent),
                                        h.shape[-1:]))
        h = h * there[..., None]
        pooled = self.pool(F.layer_norm(h.sum(1), h.shape[-1:]))         # (B, E)
        return pooled, self.split(h), there                              # tokens are atoms


def spell(smiles, ways=8):
    """The tokens of a molecule's canonical SMILES, then of random but reproducible spellings."""
    molecule = parse_smiles(smiles)
    random = Chem.MolToRandomSmilesVect(molecule, ways - 1, randomSeed=1)
    return [re.findall(r"\[[^\]]+\]|Br|Cl|%\d\d|.", text)
            for text in (Chem.MolToSmiles(molecule), *random)]


class SmilesTransformer(Encoder):
    """A small transformer over the tokens of SMILES. In training each molecule is spelt at random
    in one of several ways (Bjerrum 2017, arXiv:1703.07076), otherwise in the canonical one."""
    spellings, longest, width, layers = 8, 96, 128, 2

    @classmethod
    def fit(cls, smiles, options):
        return {"vocabulary": sorted({token for ways in each_molecule(spell, smiles)
                                      for spelling in ways for token in spelling})}

    def build(self, embedding, token):
        words = len(self.settings["vocabulary"]) + 2                     # 0 none, 1 unknown
        self.embed = nn.Embedding(words, self.width)
        self.place = nn.Parameter(torch.randn(self.longest, self.width) * .02)
        layer = nn.TransformerEncoderLayer(self.width, 4, 2 * self.width, 0., "gelu",
                                           batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        self.pool = mlp(self.width, embedding, embedding)
        self.split = nn.Linear(self.width, token)

    def featurise(self, smiles):
        """(M * spellings, L): places in the vocabulary, a molecule's spellings one after another.
        Those of more than `longest` tokens are cut, which is said."""
        place = {t: i + 2 for i, t in enumerate(self.settings["vocabulary"])}
        spelt = each_molecule(spell, smiles)
        if cut := sum(len(ways[0]) > self.longest for ways in spelt):
            print(f"{cut} of {len(smiles)} SMILES have more than {self.longest} tokens: the "
                  "encoder reads no further")
        lines = [torch.tensor([place.get(t, 1) for t in spelling[:self.longest]])
                 for ways in spelt for spelling in ways]
        return nn.utils.rnn.pad_sequence(lines, batch_first=True)

    def forward(self, codes):                                            # (B, L)
        there = codes > 0
        h = self.embed(codes) + self.place[:codes.shape[1]]
        h = self.body(h, src_key_padding_mask=~there)                    # (B, L, width)
        h = h * there[..., None]
        pooled = self.pool(h.sum(1) / there.sum(1, keepdim=True).clamp(min=1))
        return pooled, self.split(h), there


MOLECULE_ENCODERS = {"fingerprint": Fingerprint, "descriptors": DescriptorEncoder, "graph": Graph,
                     "smiles": SmilesTransformer, "table": Table, "identity": Identity}


# --- the conditioner ------------------------------------------------------------------------------

class NumberEncoder(nn.Module):
    """The timestep's own sinusoid of a number in [0, 1000] (as in unet.py), then an MLP."""

    def __init__(self, embedding):
        super().__init__()
        self.mlp = mlp(256, embedding, embedding)

    def forward(self, value):                                            # (B,)
        frequency = torch.exp(-math.log(10_000) * torch.arange(128, device=value.device) / 128)
        angle = value.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))        # (B, E)


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
        self.empty = nn.Parameter(torch.zeros(embedding), requires_grad=False)  # of no field

    def encoder_of(self, field, embedding, token):
        if field.kind == "molecule":
            return self.encoder_class(self.molecule_settings, embedding, token)
        if field.kind == "category":
            return nn.Embedding(len(field.vocabulary), embedding)
        return NumberEncoder(embedding)

    def encode(self, columns, n):
        """Strings {name: [n values]} to (codes {name: (n,)}, known (n, fields) bool, molecules
        {name: features (M, ...)}). A column that is missing is unknown. `molecules` has `spellings`
        rows for each distinct molecule; its code is the first of them, the canonical one."""
        codes, known, molecules = {}, torch.zeros(n, len(self.fields), dtype=torch.bool), {}
        for i, field in enumerate(self.fields):
            values = columns.get(field.name, [""] * n)
            if field.kind != "molecule":
                codes[field.name], known[:, i] = field.encode(values)
                continue
            # where no molecule is known, any that can be encoded stands in; it is not shown
            distinct = sorted(set(values) - {""}) or [self.molecule_settings.get("example", "C")]
            for smiles in distinct:
                if not self.encoder_class.is_molecule(smiles):
                    raise FieldError(f"{field.name}={smiles}: no valid SMILES")
            places = dict(zip(distinct, itertools.count(0, self.encoder_class.spellings)))
            codes[field.name] = torch.tensor([places.get(v, 0) for v in values])
            known[:, i] = torch.tensor([v != "" for v in values])
            molecules[field.name] = self.encoders[i].featurise(distinct)
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


# --- what training hides and redraws --------------------------------------------------------------

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
    """At dose 0 the molecule cannot matter: show half of the controls with a random molecule, so
    that a dose sweep from 0 stays inside what was learned. Returns codes with some replaced.

    A control is a sample that is *shown* all its doses (dose_fields) at 0: where one is hidden or
    unknown, another molecule would be a lie. keep (n, fields) bool.
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


def draw_spelling(fields, codes, encoder, rng):
    """Codes with one of the `spellings` of each molecule drawn at random; encoder: its class."""
    ways = encoder.spellings
    return codes if ways == 1 else codes | {
        f.name: codes[f.name] // ways * ways + torch.randint(ways, codes[f.name].shape,
                                                             generator=rng)
        for f in fields if f.kind == "molecule"}
