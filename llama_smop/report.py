"""One self-contained HTML page about a run, made again at any time from the JSON files that the run left."""

import base64
import html
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llama_smop import files, plots
from llama_smop.data.media import audio_path, read_audio, read_video

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead, figcaption, small { color: #555; }
figure { margin: 1rem 0 1.6rem; }
img { max-width: 100%; display: block; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #e5e5e5; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: #2c6e36; } .wrong { color: #b3261e; text-decoration: underline; }
code { background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px; }
"""


def write_report(run: str | Path) -> Path:
    """`run/report.html`, from what `llama-smop demo` left in `run`.

    Raises:
        ValueError: a result the report needs is not there yet.
    """
    run = Path(run)
    facts = {
        name: _read(run / f"{name}.json") for name in ("demo", "metrics", "evaluation", "transcripts", "projectors")
    }
    body = [
        _header(facts),
        _accuracy(facts["evaluation"]),
        _clips(run, facts["transcripts"]),
        _training(facts["metrics"]),
        _experts(facts["evaluation"]),
        _projectors(facts["projectors"]),
        _footer(facts["demo"]),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Llama-SMoP demo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    return files.write_text(run / "report.html", page)


def _read(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; run `llama-smop demo --out {path.parent}` to its end first") from None


def _header(facts: dict) -> str:
    demo, rows = facts["demo"], facts["evaluation"]["rows"]
    clean, noisy = (_wer(rows, "audiovisual", snr) for snr in (None, 0))
    audio = _wer(rows, "audio", 0)
    return (
        "<h1>A Llama-SMoP that listens and reads lips</h1>"
        f'<p class="lead">Trained from scratch on {demo["train_clips"]} generated talking-head clips (synthetic: '
        f"espeak-ng speech, drawn faces), scored on {demo['test_clips']} clips of sentences it never saw.</p>"
        f"<p>Listening and reading lips it gets <b>{_percent(clean)}</b> of the words wrong in clean speech and "
        f"<b>{_percent(noisy)}</b> in babble as loud as the speaker (0 dB), where listening alone gets "
        f"<b>{_percent(audio)}</b> wrong.</p>"
    )


def _accuracy(evaluation: dict) -> str:
    rows, chance, blind = evaluation["rows"], evaluation["guess_per_slot"], evaluation["no_input"]
    snrs = sorted({r["snr"] for r in rows}, key=lambda s: (s is not None, -(s or 0)))
    head = "".join(f'<th class="number">{"clean" if s is None else f"{s:g} dB"}</th>' for s in snrs)
    lines = []
    for labels, modality in dict.fromkeys((r["labels"], r["modality"]) for r in rows):
        cells = "".join(f'<td class="number">{_percent(_wer(rows, modality, s, labels), empty="")}</td>' for s in snrs)
        lines.append(f"<tr><td>{_labels(labels)}</td><td>{plots.NAMES[modality]}</td>{cells}</tr>")
    figure = plots.wer_against_snr([r for r in rows if r["labels"] == "test"], chance)
    return (
        "<h2>Word error rate</h2>"
        + _picture(figure, "Unseen sentences, voices of the training. Babble is other clips talking at once.")
        + f"<table><tr><th>clips</th><th>input</th>{head}</tr>{''.join(lines)}</table>"
        + f"<p>For comparison: a random guess in each slot of the grammar gets {_percent(chance)} of the words wrong; "
        f"this model given silence and a blank picture, {_percent(blind)}.</p>"
    )


def _clips(run: Path, transcripts: list[dict]) -> str:
    parts = ["<h2>What it heard</h2>"]
    for clip in transcripts:
        path = run / clip["path"]
        strip = plots.clip_strip(read_video(path), read_audio(audio_path(path)))
        heard = "".join(
            f"<tr><td>{html.escape(h['condition'])}</td><td>{_marked(clip['reference'], h['text'])}</td></tr>"
            for h in clip["hypotheses"]
        )
        said = f"<tr><td>said</td><td><b>{html.escape(clip['reference'])}</b></td></tr>"
        parts.append(f"{_picture(strip, html.escape(clip['id']))}<table>{said}{heard}</table>")
    return "".join(parts)


def _training(log: list[dict]) -> str:
    return "<h2>Training</h2>" + _picture(
        plots.losses(log),
        "Each step is a batch of one kind: audio, video or both. Babble begins after the clean start.",
    )


def _experts(evaluation: dict) -> str:
    activation = evaluation["expert_activation"]
    if activation is None:
        return ""
    return "<h2>Who uses which expert</h2>" + _picture(
        plots.expert_activation(activation["shares"], activation["experts_of"]),
        f"Test clips with audio and video, sharing {activation['sharing']}; dotted: an even load.",
    )


def _projectors(measured: dict) -> str:
    note = html.escape(measured["what"])
    return "<h2>Dense against sparse projector</h2>" + _picture(plots.projector_bars(measured["rows"]), note)


def _footer(demo: dict) -> str:
    items = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in demo["facts"].items()
    )
    return f"<h2>How it was made</h2><table>{items}</table><p><small><code>llama-smop demo</code></small></p>"


def _labels(name: str) -> str:
    return {"test": "unseen sentences", "test_unseen_voice": "unseen sentences, unseen voice"}.get(
        name, html.escape(name)
    )


def _wer(rows: list[dict], modality: str, snr: float | None, labels: str = "test") -> float | None:
    found = [r["wer"] for r in rows if (r["modality"], r["snr"], r["labels"]) == (modality, snr, labels)]
    return found[0] if found else None


def _percent(share: float | None, empty: str = "–") -> str:
    return empty if share is None else f"{100 * share:.1f} %"


def _marked(reference: str, hypothesis: str) -> str:
    """The hypothesis with the words that the reference does not have at that place underlined."""
    import jiwer

    words = hypothesis.split()
    if not words:
        return '<span class="wrong">(nothing)</span>'
    right = [False] * len(words)
    for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
        if chunk.type == "equal":
            for i in range(chunk.hyp_start_idx, chunk.hyp_end_idx):
                right[i] = True
    return " ".join(
        f'<span class="{"good" if ok else "wrong"}">{html.escape(w)}</span>' for w, ok in zip(words, right, strict=True)
    )


def _picture(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
