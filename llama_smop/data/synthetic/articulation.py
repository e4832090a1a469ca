"""Articulation parameters of a mouth, 25 a second, from phonemes with their times.

Each phoneme is a viseme, a target for eight parameters. Targets are blended over time by dominance functions (Cohen
and Massaro, "Modeling coarticulation in synthetic visual speech", 1993), so that a bilabial closes fully, a rounded
vowel rounds the consonants around it, and nothing jumps. Sounds that look alike on real lips (p b m; s z; k g) look
alike here.
"""

import numpy as np

from llama_smop.data.synthetic.speech import Segment
from llama_smop.models.units import VIDEO_RATE

PARAMETERS = ("jaw", "open", "spread", "round", "teeth", "tongue", "tuck", "press")
_ANY = float("nan")  # the viseme leaves this parameter to its neighbours

#                 jaw   open  spread round teeth tongue tuck press
_VISEMES = {
    "rest": (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.0, 0.0),
    "bilabial": (0.05, 0.00, _ANY, _ANY, 0.00, _ANY, 0.0, 1.0),
    "labiodental": (0.10, 0.10, 0.15, _ANY, 1.00, 0.10, 1.0, 0.0),
    "dental": (0.22, 0.34, 0.10, 0.00, 0.70, 1.00, 0.0, 0.0),
    "alveolar": (0.15, 0.26, 0.20, _ANY, 0.80, 0.70, 0.0, 0.0),
    "lateral": (0.25, 0.42, 0.15, 0.00, 0.60, 0.85, 0.0, 0.0),
    "sibilant": (0.03, 0.20, 0.50, _ANY, 1.00, 0.10, 0.0, 0.0),
    "postalveolar": (0.08, 0.28, 0.00, 0.70, 1.00, 0.10, 0.0, 0.0),
    "velar": (0.20, 0.30, _ANY, _ANY, 0.40, 0.15, 0.0, 0.0),
    "rhotic": (0.15, 0.24, 0.00, 0.50, 0.40, 0.45, 0.0, 0.0),
    "glide_w": (0.08, 0.14, 0.00, 1.00, 0.00, 0.00, 0.0, 0.0),
    "glide_j": (0.10, 0.22, 0.60, _ANY, 0.80, 0.50, 0.0, 0.0),
    "i": (0.12, 0.28, 1.00, 0.00, 0.90, 0.45, 0.0, 0.0),
    "ih": (0.22, 0.34, 0.55, 0.00, 0.70, 0.30, 0.0, 0.0),
    "e": (0.45, 0.58, 0.50, 0.00, 0.60, 0.25, 0.0, 0.0),
    "ae": (0.75, 0.84, 0.45, 0.00, 0.55, 0.20, 0.0, 0.0),
    "ah": (0.95, 1.00, 0.00, 0.00, 0.35, 0.05, 0.0, 0.0),
    "uh": (0.50, 0.58, 0.00, 0.10, 0.40, 0.15, 0.0, 0.0),
    "aw": (0.60, 0.66, 0.00, 0.60, 0.10, 0.05, 0.0, 0.0),
    "oh": (0.35, 0.44, 0.00, 0.80, 0.00, 0.05, 0.0, 0.0),
    "u": (0.12, 0.20, 0.00, 1.00, 0.00, 0.00, 0.0, 0.0),
    "hook": (0.20, 0.26, 0.00, 0.65, 0.10, 0.10, 0.0, 0.0),
    "schwa": (0.25, 0.34, 0.05, 0.05, 0.40, 0.20, 0.0, 0.0),
    "er": (0.28, 0.34, 0.00, 0.45, 0.30, 0.30, 0.0, 0.0),
}
# How strongly a viseme holds against its neighbours; 1 where it is not named.
_STRENGTH = {"bilabial": 9.0, "labiodental": 6.0, "glide_w": 3.0, "u": 2.5, "postalveolar": 2.5, "dental": 3.0}
_STRENGTH |= {"velar": 0.4, "schwa": 0.6, "alveolar": 0.8, "rest": 1.5, "lateral": 1.2}

# espeak mnemonics without stress and length marks; vowels of two parts give two visemes.
_CONSONANTS = {
    "bilabial": "p b m",
    "labiodental": "f v",
    "dental": "T D",
    "alveolar": "t d n 4 *",
    "lateral": "l",
    "sibilant": "s z",
    "postalveolar": "S Z tS dZ",
    "velar": "k g N x C h H ?",
    "rhotic": "r R",
    "glide_w": "w W",
    "glide_j": "j",
}
_VOWEL_PARTS = {
    "i": "i",
    "I": "ih",
    "e": "e",
    "E": "e",
    "a": "ae",
    "A": "ah",
    "V": "uh",
    "0": "aw",
    "O": "aw",
    "o": "oh",
    "U": "hook",
    "u": "u",
    "@": "schwa",
    "3": "er",
    "L": "lateral",
}
_CONSONANT_OF = {name: viseme for viseme, names in _CONSONANTS.items() for name in names.split()}


def visemes(phoneme: str) -> tuple[str, ...]:
    """The viseme of an espeak mnemonic, two for a diphthong; an unknown one moves the mouth like a schwa."""
    name = phoneme.strip("',_%=|;!~`^\"-")
    if not name:
        return ("rest",)
    bare = name.rstrip("#:2-;") or name
    for form in (name, bare, bare[:2], bare[:1]):
        if form in _CONSONANT_OF:
            return (_CONSONANT_OF[form],)
    if bare in ("aI", "aU"):  # these start lower than "cat"
        return ("ah", _VOWEL_PARTS[bare[1]])
    if len(bare) > 1 and bare[0] in "AOoeiU" and bare[1] == "@":  # r-coloured: car, four
        return (_VOWEL_PARTS[bare[0]], "er")
    parts = tuple(_VOWEL_PARTS[c] for c in bare[:2] if c in _VOWEL_PARTS)
    return parts or ("schwa",)


def articulation(phonemes: tuple[Segment, ...], n_frames: int, offset: float = 0.0) -> np.ndarray:
    """PARAMETERS over time, float32 (n_frames, 8); `offset` seconds are added to every phoneme's time."""
    names, starts, ends = ["rest"], [-1.0], [offset]
    for phoneme in phonemes:
        start, end = phoneme.start + offset, phoneme.end + offset
        if phoneme.name == "_":
            continue
        parts = visemes(phoneme.name)
        if parts == ("bilabial",) and phoneme.name[-1] in "pb":  # espeak marks the release; the lips close before it
            start, end = start - 0.05, start + 0.02
        edges = np.linspace(start, end, len(parts) + 1)
        names += parts
        starts += list(edges[:-1])
        ends += list(edges[1:])
    names.append("rest")
    starts.append(max(ends) + 0.02)
    ends.append(n_frames / VIDEO_RATE + 1.0)

    targets = np.array([_VISEMES[name] for name in names])  # (N, 8)
    strength = np.array([_STRENGTH.get(name, 1.0) for name in names])
    begin, finish = np.array(starts), np.array(ends)
    time = (np.arange(n_frames) + 0.5) / VIDEO_RATE
    centre, half = (begin + finish) / 2, (finish - begin) / 2
    away = np.maximum(np.abs(time[:, None] - centre) - 0.5 * half, 0.0)  # (n_frames, N)
    reach = np.clip(0.5 * half, 0.02, 0.04)
    dominance = strength * np.exp(-away / reach)
    known = ~np.isnan(targets)
    weights = dominance[:, :, None] * np.where(known, 1.0, 1e-3)
    return ((weights * np.where(known, targets, 0.0)).sum(1) / weights.sum(1)).astype(np.float32)
