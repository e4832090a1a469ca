"""`llama-smop report`: the report of a demo or a training, from the JSON files in its folder."""

import html
from pathlib import Path

from llama_smop.data.media import audio_path, read_audio, read_video
from llama_smop.reports import plots
from llama_smop.reports.html import facts as fact_table
from llama_smop.reports.html import percent, picture, png, shown, wer_table, write_page
from llama_smop.reports.training import REPORT, is_run, write_run_report
from llama_smop.system import files

LATER = ("pictures", "raw_video")  # results that demos of earlier versions lack
LABELS = {"test": "unseen sentences", "test_unseen_voice": "unseen sentences, unseen voice"}


def write_report(run: str | Path) -> Path:
    """Write `run/report.html` from the results of a training or of `llama-smop demo` in `run`.

    Raises:
        ValueError: a result that the report needs is missing, or a file has other content than it should.
    """
    run = Path(run)
    files.check_file(run / REPORT)
    if is_run(run):
        return write_run_report(run)
    facts = {
        name: _read(run / f"{name}.json") for name in ("demo", "metrics", "evaluation", "transcripts", "projectors")
    }
    for name in LATER:
        if (run / f"{name}.json").exists():
            facts[name] = _read(run / f"{name}.json")
    parts = (
        ("demo", lambda: _lead(facts["demo"])),
        ("evaluation", lambda: _result(facts["evaluation"]["rows"])),
        ("evaluation", lambda: _accuracy(facts["evaluation"])),
        ("transcripts", lambda: _clips(run, facts["transcripts"])),
        *((("pictures", lambda: _pictures(facts["pictures"])),) if "pictures" in facts else ()),
        *((("raw_video", lambda: _raw_video(run, facts["raw_video"])),) if "raw_video" in facts else ()),
        ("metrics", lambda: _training(facts["metrics"])),
        ("evaluation", lambda: _experts(facts["evaluation"])),
        ("projectors", lambda: _projectors(facts["projectors"])),
        ("demo", lambda: _footer(facts["demo"])),
    )
    body = []
    for name, part in parts:
        with shown(run / f"{name}.json"):
            body.append(part())
    return write_page(run / REPORT, "Llama-SMoP demo", body)


def _read(path: Path):
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not there; run `llama-smop demo --out {path.parent}` (or a training) to its end first"
        ) from None


def _lead(demo: dict) -> str:
    train_clips, test_clips = (html.escape(str(demo[name])) for name in ("train_clips", "test_clips"))
    return (
        "<h1>A Llama-SMoP that listens and reads lips</h1>"
        f'<p class="lead">Trained from scratch on {train_clips} generated talking-head clips (synthetic: '
        f"espeak-ng speech, drawn faces), scored on {test_clips} clips of sentences it never saw.</p>"
    )


def _result(rows: list[dict]) -> str:
    clean, noisy = (_wer(rows, "audiovisual", snr) for snr in (None, 0))
    audio = _wer(rows, "audio", 0)
    return (
        f"<p>Listening and reading lips it gets <b>{percent(clean)}</b> of the words wrong in clean speech and "
        f"<b>{percent(noisy)}</b> in babble as loud as the speaker (0 dB), where listening alone gets "
        f"<b>{percent(audio)}</b> wrong.</p>"
    )


def _accuracy(evaluation: dict) -> str:
    rows, chance, blind = evaluation["rows"], evaluation["guess_per_slot"], evaluation["no_input"]
    figure = plots.wer_against_snr([r for r in rows if r["labels"] == "test"], chance)
    return (
        "<h2>Word error rate</h2>"
        + picture(figure, "Unseen sentences, voices of the training. Babble is other clips talking at once.")
        + wer_table(rows, LABELS)
        + f"<p>For comparison: a random guess in each slot of the grammar gets {percent(chance)} of the words wrong; "
        f"this model given silence and a blank picture, {percent(blind)}.</p>"
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
        parts.append(f"{picture(strip, clip['id'])}<table>{said}{heard}</table>")
    return "".join(parts)


def _pictures(rows: list[dict]) -> str:
    figure = plots.wer_against_degradation(rows)
    caption = f"{rows[0]['clips']} of the unseen sentences; mouths blurred, speech in babble as loud as the speaker."
    return "<h2>What sight is worth</h2>" + picture(figure, caption) + wer_table(rows, LABELS)


def _raw_video(run: Path, found: dict) -> str:
    head = "<h2>From a raw video</h2>"
    if "missing" in found:
        return f"{head}<p>Left out: {html.escape(found['missing'])}</p>"
    lead = (
        "<p>The speakers as a camera would film them, 640×480 pixels, moving in a room. Faces are found, followed and "
        "their mouths cropped, and the crop is read, as <code>llama-smop transcribe</code> does with any video. Below: "
        "the text from the raw video beside the text from the clip as it was made.</p>"
    )
    sheet = png((run / found["clips"][0]["sheet"]).read_bytes(), "What is found in the first one; below, the crops.")
    lines = [
        f"<tr><td><b>{html.escape(clip['reference'])}</b></td><td>{_marked(clip['reference'], clip['raw'])}</td>"
        f"<td>{_marked(clip['reference'], clip['prepared'])}</td></tr>"
        for clip in found["clips"]
    ]
    columns = "<tr><th>said</th><th>from the raw video</th><th>from the prepared clip</th></tr>"
    return f"{head}{lead}{sheet}<table>{columns}{''.join(lines)}</table>"


def _training(log: list[dict]) -> str:
    return "<h2>Training</h2>" + picture(
        plots.losses(log),
        "Each step is a batch of one kind: audio, video or both. Babble begins after the clean start.",
    )


def _experts(evaluation: dict) -> str:
    activation = evaluation["expert_activation"]
    if activation is None:
        return ""
    return "<h2>Who uses which expert</h2>" + picture(
        plots.expert_activation(activation["shares"], activation["experts_of"]),
        f"Test clips with audio and video, sharing {activation['sharing']}; dotted: an even load.",
    )


def _projectors(measured: dict) -> str:
    figure = plots.projector_bars(measured["rows"])
    return "<h2>Dense against sparse projector</h2>" + picture(figure, measured["what"])


def _footer(demo: dict) -> str:
    return f"<h2>How it was made</h2>{fact_table(demo['facts'])}<p><small><code>llama-smop demo</code></small></p>"


def _wer(rows: list[dict], modality: str, snr: float | None, labels: str = "test") -> float | None:
    found = [r["wer"] for r in rows if (r["modality"], r["snr"], r["labels"]) == (modality, snr, labels)]
    return found[0] if found else None


def _marked(reference: str, hypothesis: str) -> str:
    """The hypothesis as HTML; words that are not in the reference at that place are underlined."""
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
