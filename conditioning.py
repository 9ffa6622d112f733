"""Metadata and molecules to what the U-Net receives: a vector, and tokens for cross-attention.

A field is a metadata column with a kind and a group (biology or experiment). As in DiffusionSat
(Khanna et al. 2024, arXiv:2312.03606) a number goes through the timestep's sinusoid and an MLP of
its own, and is added to the timestep embedding. Unlike there, absence is a learned null and not the
legal value 0, each group is mixed by an MLP and normalised, and the combinations that guidance
needs are trained on purpose (`draw_keep`).
"""
import itertools
import math
import re
import zipfile
from dataclasses import dataclass, field as dataclass_field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from rdkit import Chem, RDLogger
from rdkit.Chem import Descriptors, rdFingerprintGenerator
from rdkit.ML.Descriptors.MoleculeDescriptors import MolecularDescriptorCalculator

RDLogger.DisableLog("rdApp.*")
OUTCOMES = ("true_", "n_nuclei", "img_cnt_cells")  # measured from the image: telling them leaks it
DOSES = ("dose", "conc")  # how the names of doses begin
KINDS = ("molecule", "number", "log", "category")  # log: a number of at least 0, such as a dose


class FieldError(ValueError):
    """Faults in the fields or in a request, one line each."""


# --- fields: what each column means, learned from the training rows ------------------------------

def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def parse_smiles(text):
    """SMILES to an RDKit molecule; None if it is none. A ChemAxon tail (` |c:5|`) is cut off, and
    of a salt only the largest part is kept: the counter-ion does not act on cells."""
    words = text.split()
    molecule = Chem.MolFromSmiles(words[0]) if words else None
    if molecule and "." in words[0]:
        molecule = max(Chem.GetMolFrags(molecule, asMols=True), key=lambda part: (
            part.GetNumHeavyAtoms(), Chem.MolToSmiles(part)))  # whatever the order in the text
    return molecule


@dataclass
class Field:
    """One condition. `low`, `high` and `vocabulary` are learned by `fit` from training rows."""
    name: str
    kind: str           # one of KINDS
    group: str
    low: float = 0.     # smallest training value; of a log field the smallest above zero
    high: float = 1.    # largest training value
    vocabulary: list = dataclass_field(default_factory=list)  # categories, sorted

    def unfit(self, values, is_molecule=parse_smiles):
        """{value: what is wrong with it} of those of the strings that this kind cannot be; a blank
        is unknown and always fits. is_molecule: the encoder's, which may take more than SMILES."""
        fits, complaint = {
            "molecule": (is_molecule, "is no valid SMILES"),
            "number": (is_number, "is not a number"),
            "log": (lambda v: is_number(v) and float(v) >= 0, "is not a number of at least 0"),
            "category": (lambda v: v.lower() != "nan", "is no category: leave unknowns blank"),
        }[self.kind]
        return {v: complaint for v in dict.fromkeys(values) if v != "" and not fits(v)}

    def fit(self, values):
        """Learn the range or the vocabulary from strings; blanks are skipped. Returns self."""
        known = [v for v in values if v != ""]
        if not known:
            raise FieldError(f"column {self.name} is blank in every training row")
        if self.kind == "category":
            self.vocabulary = sorted(set(known))
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
        """Strings to codes (N,), 0 for a blank: a scaled number, or a category's place in the
        vocabulary. Molecules are encoded by `Conditioner`."""
        if self.kind != "category":
            return torch.tensor([self.scale(float(v)) if v else 0. for v in values])
        if unknown := sorted(set(values) - {"", *self.vocabulary}):
            raise FieldError(f"unknown {self.name} {unknown[0]}: known are "
                             + ", ".join(self.vocabulary))
        return torch.tensor([self.vocabulary.index(v) if v else 0 for v in values])


def parse_fields(groups, columns, is_molecule=parse_smiles, path=""):
    """Fields, not fitted yet, from groups {group: ["smiles:molecule", "dose", ...]}, the kind
    optional where it can be told. The rest, and the faults: see check_columns."""
    fields = []
    for group, specifications in groups.items():
        for name, _, kind in (text.partition(":") for text in specifications):
            if not kind and name.lower() == "smiles":
                kind = "molecule"
            elif not kind and name.lower().startswith(DOSES):
                kind = "log"
            elif not kind and not all(v == "" or is_number(v) for v in columns.get(name, ())):
                kind = "category"
            fields.append(Field(name, kind, group))
    check_columns(fields, columns, is_molecule, path)
    return fields


def check_columns(fields, columns, is_molecule=parse_smiles, path=""):
    """Refuse columns {name: strings} of the manifest at `path` that lack a field or have unsound
    values of one. All faults are raised together as one FieldError, at most ten rows of a column;
    rows are counted as in a spreadsheet, where the header is row 1."""
    lines, names, where = [], [f.name for f in fields], f"{path}, " if path else ""
    for i, (name, field) in enumerate(zip(names, fields)):
        if name in names[:i]:
            lines.append(f"field {name} is given twice")
        elif name.lower().removeprefix("metadata_").startswith(OUTCOMES):
            lines.append(f"field {name} is an outcome: it would give the answer away")
        elif name not in columns:
            lines.append(f"{where}no column {name}: there are {', '.join(columns)}")
        elif field.kind not in KINDS:
            lines.append(f"{where}column {name}: write {name}:category or {name}:number, :log or "
                         ":molecule")
        else:
            unfit = field.unfit(columns[name], is_molecule)
            rows = [f"{where}row {k + 2}, column {name}: {value} {unfit[value]}"
                    for k, value in enumerate(columns[name]) if value in unfit]
            lines += rows[:10] + [f"and {len(rows) - 10} more such rows"] * (len(rows) > 10)
    if lines:
        raise FieldError("\n".join(lines))


def treatment_group(fields):
    """The group that says what was done to the cells: that of the first molecule, or dose."""
    return next((f.group for kind in ("molecule", "log") for f in fields if f.kind == kind), None)


def dose_fields(fields):
    """The fields that are 0 for a negative control: log fields named dose or conc, or else those
    of the molecule's group. May be none."""
    logs = [f for f in fields if f.kind == "log"]
    named = [f for f in logs if f.name.lower().startswith(DOSES)]
    return named or [f for f in logs if f.group == treatment_group(fields)]


def known_columns(fields, columns, rows, hidden=None):
    """{field: values of these rows} without the fields of the group `hidden`; "" (unknown) where
    the column is missing or training never saw the category."""
    def known(field, i):
        value = columns[field.name][i] if field.name in columns else ""
        return value if field.kind != "category" or value in field.vocabulary else ""
    return {f.name: [known(f, i) for i in rows] for f in fields if f.group != hidden}


# --- molecule encoders ----------------------------------------------------------------------------
#
# An encoder has `fit`, its settings from the training molecules and {option: value}, which travel
# in the checkpoint; `featurise`, done once for each molecule; and `forward`, at every step:
# features (B, ...) to a pooled vector (B, E), tokens (B, L, D) and which tokens count (B, L).

def mlp(cin, hidden, cout):
    return nn.Sequential(nn.Linear(cin, hidden), nn.SiLU(), nn.Linear(hidden, cout))


class Encoder(nn.Module):
    """An encoder of fixed vectors: an MLP, and a few tokens split from its output."""
    tokens = 4
    spellings = 1  # rows of `featurise` for each molecule, the canonical spelling first
    is_molecule = staticmethod(parse_smiles)

    def __init__(self, settings, embedding, token):
        super().__init__()
        self.settings = settings
        self.build(embedding, token)

    @classmethod
    def fit(cls, smiles, options):
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


class DescriptorEncoder(Standardised):
    """RDKit's two hundred descriptors (weight, polar area, charges, counts of fragments ...).
    Blind to handedness."""

    @staticmethod
    def vectors(smiles, settings):
        # without the score of drug-likeness: a function of the others, a third of the time
        names = [name for name, _ in Descriptors.descList if name != "qed"]
        calculate = MolecularDescriptorCalculator(names).CalcDescriptors
        return np.array([calculate(parse_smiles(s), missingVal=math.nan) for s in smiles], float)


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
        known = {"table": str(options.get("table", "")), "example": smiles[0], "vectors": {}}
        vectors = cls.vectors(smiles, known).tolist()
        known["vectors"] = dict(zip(map(molecule_key, smiles), vectors))
        return known | super().fit(smiles, known)

    @staticmethod
    def vectors(smiles, settings):
        keys, found = [molecule_key(s) for s in smiles], settings["vectors"]
        try:
            if not set(keys) <= set(found):
                with np.load(settings["table"]) as table:
                    found = {key: table[name].astype(float).ravel() for key, s in
                             zip(keys, smiles) for name in (key, s) if name in table} | found
            if missing := [s for key, s in zip(keys, smiles) if key not in found]:
                raise ValueError(f"nothing for {len(missing)} molecules, such as {missing[0]}")
            np.stack([*found.values()])  # refuses vectors of different lengths
            return np.array([found[key] for key in keys])
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as fault:
            raise FieldError(f"--molecule_table {settings['table']}: {fault} (wanted: an .npz of "
                             "vectors of one length by SMILES, InChIKey or name)") from None


class Identity(Encoder):
    """One vector for each training molecule, one for all that are unseen: what an encoder that
    knows nothing of structure can do. It cannot generalise, and is there to show that."""

    @classmethod
    def fit(cls, smiles, options):
        return {"known": sorted(set(map(molecule_key, smiles)))}

    def build(self, embedding, token):
        self.pool = nn.Embedding(len(self.settings["known"]) + 1, embedding)  # 0: unseen
        self.split = nn.Linear(embedding, self.tokens * token)

    def featurise(self, smiles):                                         # (M,)
        places = {key: i + 1 for i, key in enumerate(self.settings["known"])}
        return torch.tensor([places.get(molecule_key(s), 0) for s in smiles])


BONDS = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "AROMATIC": 4, "STEREOE": 5, "STEREOZ": 6}
ATOM_SIZES = (100, 8, 8, 3, 2, 2)  # element, charge, hydrogens, handedness, aromatic, ring


class Graph(Encoder):
    """Message passing over atoms and bonds: a graph isomorphism network (Xu et al. 2019,
    arXiv:1810.00826) with one weight per type of bond. Its states live on atoms, which are the
    tokens. Handedness and E/Z enter by their labels, so neither depends on the order of atoms."""
    width = 128

    def build(self, embedding, token):
        w, rounds = self.width, range(4)
        self.atom = nn.ModuleList(nn.Embedding(n, w) for n in ATOM_SIZES)
        self.bond = nn.ModuleList(nn.Linear(w, 6 * w) for _ in rounds)
        self.update = nn.ModuleList(mlp(w, 2 * w, w) for _ in rounds)
        self.pool = mlp(w, embedding, embedding)
        self.split = nn.Linear(w, token)

    def featurise(self, smiles):
        """(M, A, 6 + A) uint8: each atom's places in ATOM_SIZES, of which the element is 0 for
        none, and its bonds with every atom, 0 for none."""
        molecules = [parse_smiles(s) for s in smiles]
        size = max(molecule.GetNumAtoms() for molecule in molecules)
        graphs = np.zeros((len(smiles), size, 6 + size), np.uint8)
        for graph, molecule in zip(graphs, molecules):
            Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
            for row, a in zip(graph, molecule.GetAtoms()):
                hand = {"R": 1, "S": 2}.get(a.GetPropsAsDict(True, True).get("_CIPCode"), 0)
                row[:6] = (min(a.GetAtomicNum(), 99), a.GetFormalCharge() % 8,
                           min(a.GetTotalNumHs(), 7), hand, a.GetIsAromatic(), a.IsInRing())
            for bond in molecule.GetBonds():
                i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
                kind = BONDS.get(str(bond.GetStereo()), BONDS.get(str(bond.GetBondType()), 1))
                graph[i, 6 + j] = graph[j, 6 + i] = kind
        return torch.from_numpy(graphs)

    def forward(self, graph):                                            # (B, A, 6 + A)
        atoms, bonds = graph.long().tensor_split([6], 2)
        there = atoms[:, :, 0] > 0                                       # (B, A)
        h = sum(table(code) for table, code in zip(self.atom, atoms.unbind(2)))  # (B, A, width)
        bonds = F.one_hot(bonds, 7)[..., 1:].to(h)                       # (B, A, A, 6)
        for messages, update in zip(self.bond, self.update):
            sent = messages(h).unflatten(2, (6, self.width))             # (B, A, 6, width)
            received = torch.einsum("bijk,bjkc->bic", bonds, sent)       # (B, A, width)
            h = h + update(F.layer_norm(h + received, h.shape[-1:]))
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
        return {"vocabulary": sorted({token for s in smiles for way in spell(s) for token in way})}

    def build(self, embedding, token):
        self.embed = nn.Embedding(2 + len(self.settings["vocabulary"]), self.width)
        self.place = nn.Parameter(torch.randn(self.longest, self.width) * .02)
        layer = nn.TransformerEncoderLayer(self.width, 4, 2 * self.width, 0., "gelu",
                                           batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        self.pool = mlp(self.width, embedding, embedding)
        self.split = nn.Linear(self.width, token)

    def featurise(self, smiles):
        """(M * spellings, L): places in the vocabulary, 0 for none and 1 for unknown, a molecule's
        spellings one after another. What has more than `longest` tokens is cut, which is said."""
        places = {t: i + 2 for i, t in enumerate(self.settings["vocabulary"])}
        spelt = [way for s in smiles for way in spell(s)]
        if cut := sum(len(way) > self.longest for way in spelt[::self.spellings]):
            print(f"{cut} of {len(smiles)} SMILES are read no further than {self.longest} tokens")
        return nn.utils.rnn.pad_sequence([torch.tensor(
            [places.get(t, 1) for t in way[:self.longest]]) for way in spelt], batch_first=True)

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
        # lists in the order of fields and groups: a column may have any name, a module may not
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
            for value, complaint in field.unfit(values, self.encoder_class.is_molecule).items():
                raise FieldError(f"{field.name}={value} {complaint}")
            known[:, i] = torch.tensor([v != "" for v in values])
            if field.kind != "molecule":
                codes[field.name] = field.encode(values)
                continue
            # where no molecule is known, any that can be encoded stands in; it is not shown
            distinct = sorted(set(values) - {""}) or [self.molecule_settings.get("example", "C")]
            places = dict(zip(distinct, itertools.count(0, self.encoder_class.spellings)))
            codes[field.name] = torch.tensor([places.get(v, 0) for v in values])
            molecules[field.name] = self.encoders[i].featurise(distinct)
        return codes, known, molecules

    def forward(self, codes, keep, molecules):
        """codes {name: (B,)}, keep (B, fields) bool, molecules {name: (M, ...)} as from encode."""
        sums = dict.fromkeys(self.groups, 0.)
        tokens = [self.null_token.expand(len(keep), -1, -1)]             # of every sample
        mask = [torch.ones(len(keep), 1, dtype=torch.bool, device=keep.device)]
        for i, field in enumerate(self.fields):
            kept, code = keep[:, i:i + 1], codes[field.name]
            if field.kind == "molecule":
                e, t, there = self.encoders[i](molecules[field.name][code])
                tokens.append(t)
                mask.append(kept & there)
            else:
                e = self.encoders[i](code)
            e = F.layer_norm(e, e.shape[-1:])                            # (B, E)
            sums[field.group] = sums[field.group] + torch.where(kept, e, self.null[i])
        vector = self.empty.expand(len(keep), -1)
        for gain, mix, u in zip(self.gain, self.mix, sums.values()):
            vector = vector + gain * F.layer_norm(u + mix(u), u.shape[-1:])
        return vector, torch.cat(tokens, 1), torch.cat(mask, 1)          # (B, E), (B, L, D), (B, L)


# --- what training hides and redraws --------------------------------------------------------------

def draw_keep(fields, n, rng, single=.2, each=.3):
    """The dropout plan: which fields each of n samples is shown, (n, fields) bool.

    First the branch: everything 0.7, nothing 0.1, and 0.2 shared by the other subsets of groups.
    Then, in a share `single` of the samples, each kept field is dropped on its own with probability
    `each`, so that any subset may be asked for. That alone would leave all fields to few samples.
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
    """Codes of which half of the controls show a random molecule: at dose 0 it cannot matter, and
    so a dose sweep from 0 stays inside what was learned. A control is a sample that is *shown* all
    its doses (dose_fields) at 0: where one is hidden or unknown, another molecule would be a lie.
    keep (n, fields) bool."""
    doses = [keep[:, fields.index(f)] & (codes[f.name] == 0) for f in dose_fields(fields)]
    for field in (f for f in fields if f.kind == "molecule" and doses):
        swap = torch.stack(doses).all(0) & (torch.rand(len(keep), generator=rng) < share)
        other = torch.randint(len(molecules[field.name]), (len(keep),), generator=rng)
        codes = codes | {field.name: torch.where(swap, other, codes[field.name])}
    return codes


def draw_spelling(fields, codes, encoder, rng):
    """Codes with one of the `spellings` of each molecule drawn at random; encoder: its class."""
    ways, drawn = encoder.spellings, dict(codes)
    for name in (f.name for f in fields if f.kind == "molecule" and ways > 1):
        way = torch.randint(ways, codes[name].shape, generator=rng)
        drawn[name] = codes[name] // ways * ways + way
    return drawn
