"""Writes what a finished demo gave into the documents: a few lines in README.md, all of it in docs/demo/README.md.

Run: python docs/demo_section.py [RUN] — with RUN, a demo's folder whose output was kept as RUN/output.txt, its small
result files are copied to docs/demo first; without, the documents are made again from docs/demo.
"""

import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report.performance import update  # noqa: E402
from llama_smop.data.media import audio_path, read_audio, read_video  # noqa: E402
from llama_smop.reports import plots  # noqa: E402
from llama_smop.system import files  # noqa: E402

KEPT = ROOT / "docs" / "demo"
RESULTS = ("demo.json", "evaluation.json", "metrics.json", "projectors.json", "transcripts.json", "output.txt")
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def keep(run: Path) -> None:
    """Copy a demo's results and draw its first clip."""
    for name in RESULTS:
        shutil.copyfile(run / name, KEPT / name)
    clip = run / files.read_json(run / "transcripts.json")[0]["path"]
    _save(plots.clip_strip(read_video(clip), read_audio(audio_path(clip))), "clip.png")


def draw() -> None:
    evaluation = files.read_json(KEPT / "evaluation.json")
    test = [row for row in evaluation["rows"] if row["labels"] == "test"]
    _save(plots.wer_against_snr(test, evaluation["guess_per_slot"]), "wer.png")


def short() -> str:
    """README.md's text between the markers: the word error rates of unseen sentences, and one picture."""
    evaluation, demo = files.read_json(KEPT / "evaluation.json"), files.read_json(KEPT / "demo.json")
    test = [row for row in evaluation["rows"] if row["labels"] == "test"]
    snrs = sorted({row["snr"] for row in test if row["snr"] is not None}, reverse=True)
    head = ["clean", *(f"{snr:g} dB" for snr in snrs)]
    lines = [f"| word error rate, % | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for modality in ("audio", "video", "audiovisual"):
        rates = {row["snr"]: row["wer"] for row in test if row["modality"] == modality}
        cells = [f"{100 * rates[snr]:.1f}" if snr in rates else "" for snr in (None, *snrs)]
        lines.append(f"| {plots.NAMES[modality]} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""`make demo-full` trains a small DEDR model from scratch on {demo["train_clips"]} synthetic talking-head
clips (espeak-ng speech, drawn faces). On {demo["test_clips"]} clips of sentences that it never saw, in babble,
one seed ([all of it](docs/demo/README.md)):

{table}

![Word error rate against SNR](docs/demo/wer.png)
"""


def whole() -> str:
    """docs/demo/README.md."""
    output = (KEPT / "output.txt").read_text().strip()
    demo, clip = files.read_json(KEPT / "demo.json"), files.read_json(KEPT / "transcripts.json")[0]
    heard = "\n".join(f"| {h['condition']} | {h['text'] or '(nothing)'} |" for h in clip["hypotheses"])
    train, test, machine = demo["train_clips"], demo["test_clips"], demo["facts"]["machine"]
    return f"""# What the demo gave

Made by `python docs/demo_section.py` from the files beside this one.

The demo trains a small DEDR model from scratch on {train} synthetic talking-head clips (espeak-ng speech, drawn faces)
and scores it on {test} clips of sentences that it never saw. It printed, on {machine}:

```
{output}
```

One seed. The curriculum was chosen by the rates on val.csv, whose sentences are neither in train.csv nor in test.csv.
The length of the training was once chosen on test clips, of an earlier drawing: read the rates as what this demo does,
not as an estimate for new data.

The demo also writes a report with pictures; here are two. Word error rate in babble, listening, reading lips, and both:

![Word error rate against SNR](wer.png)

![Frames and sound of a clip](clip.png)

| said | {clip["reference"]} |
|---|---|
{heard}
"""


def _save(figure, name: str) -> None:
    figure.savefig(KEPT / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    draw()
    if not update(ROOT / "README.md", short(), BEGIN, END):
        sys.exit(f"README.md: expected the markers {BEGIN} and {END}, once each")
    files.write_text(KEPT / "README.md", whole())
