"""The parts of the page that gradio has no component for. Every text from outside is escaped."""

import difflib
from html import escape

from llama_smop.serve.service import Outcome, minutes
from llama_smop.transcription.attempts import Transcript
from llama_smop.transcription.pieces import Piece

SENSES = {"audiovisual": "Sound + lips", "audio": "Sound alone", "video": "Lips alone"}


def heading(name: str, line: str, caution: str | None) -> str:
    note = f'<p class="caution">{escape(caution)}</p>' if caution else ""
    return f'<h1>Llama-SMoP</h1><p class="model">Model <b>{escape(name)}</b> · {escape(line)}</p>{note}'


def notice(text: str, kind: str = "notice") -> str:
    return f'<div class="{kind}" role="status">{escape(text)}</div>'


def result(outcome: Outcome, base: str, clip: str | None, crop: str | None, experts: str) -> str:
    """All of a result. base: where its files are served; clip, crop: their names there."""
    transcript = outcome.transcript
    warnings = "".join(notice(line) for line in transcript.warnings)
    chart = f'<h3>Which experts were used, over time</h3><div class="experts">{experts}</div>' if experts else ""
    return (
        f'<div class="result"><div class="players">{_player(base, clip)}{_crop(base, crop)}</div>'
        f"{_senses(outcome)}{warnings}{_pieces(transcript)}{_downloads(base)}{chart}</div>"
    )


def _player(base: str, clip: str | None) -> str:
    if clip is None:
        return ""
    if clip.endswith(".wav"):
        return f'<audio class="clip" controls src="{base}/{clip}"></audio>'
    track = f'<track kind="subtitles" label="transcript" srclang="en" default src="{base}/transcript.vtt">'
    return f'<video class="clip" controls playsinline preload="auto" src="{base}/{clip}">{track}</video>'


def _crop(base: str, crop: str | None) -> str:
    if crop is None:
        return ""
    video = f'<video class="crop" muted playsinline preload="auto" src="{base}/{crop}"></video>'
    return f"<figure>{video}<figcaption>what the model sees</figcaption></figure>"


def _senses(outcome: Outcome) -> str:
    """The text by sense; words that differ from the first row's are marked."""
    first = outcome.transcript.text.split()
    rows = ""
    for modality, transcript in outcome.transcripts.items():
        text = _marked(first, transcript.text.split()) or '<span class="nothing">nothing</span>'
        rows += f'<tr class="{modality}"><th>{SENSES[modality]}</th><td>{text}</td></tr>'
    switches = outcome.switches
    changed = [f"babble at {switches.snr:g} dB"] if switches.snr is not None else []
    changed += [f"mouth blurred by {switches.blur:g} pixels"] if switches.blur else []
    given = f"<caption>With {' and '.join(changed)}</caption>" if changed else ""
    return f'<table class="senses">{given}{rows}</table>'


def _marked(first: list[str], words: list[str]) -> str:
    found = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, first, words, autojunk=False).get_opcodes():
        text = escape(" ".join(words[start:end]))
        if text:
            found.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return " ".join(found)


def _pieces(transcript: Transcript) -> str:
    rows = ""
    for piece in transcript.pieces:
        face = "" if piece.face is None else f' <span class="face">face {piece.face}</span>'
        rows += (
            f'<li><button type="button" class="time" data-seek="{piece.start:.3f}" data-until="{piece.end:.3f}">'
            f"▶ {minutes(piece.start)} – {minutes(piece.end)}</button>{face} {_words(piece)}</li>"
        )
    return f'<h3>Transcript</h3><ol class="pieces">{rows}</ol>' if rows else ""


def _words(piece: Piece) -> str:
    """The text; each word plays itself where its time is known."""
    if piece.words is None:
        return escape(piece.text)
    return " ".join(
        f'<span class="word" data-seek="{word.start:.3f}" data-until="{word.end:.3f}">{escape(word.word)}</span>'
        for word in piece.words
    )


def _downloads(base: str) -> str:
    kinds = (("srt", "SRT"), ("vtt", "WebVTT"), ("json", "JSON"))
    links = " ".join(f'<a href="{base}/transcript.{end}" download="transcript.{end}">{kind}</a>' for end, kind in kinds)
    return f'<p class="downloads">Download {links}</p>'
