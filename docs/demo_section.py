"""Writes the README's demo section from a finished demo: what it printed, and pictures drawn from its results.

Run: python docs/demo_section.py [RUN] — with RUN, a demo's folder whose output was kept as RUN/output.txt, its small
result files are copied to docs/demo first; without, the section is made again from docs/demo.
"""

import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_smop import files  # noqa: E402
from llama_smop.data.media import audio_path, read_audio, read_video  # noqa: E402
from llama_smop.reports import plots  # noqa: E402

KEPT = ROOT / "docs" / "demo"
RESULTS = ("demo.json", "evaluation.json", "metrics.json", "projectors.json", "transcripts.json", "output.txt")
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def keep(run: Path) -> None:
    """Copy a demo's results, and draw its first clip while its frames are at hand."""
    for name in RESULTS:
        shutil.copyfile(run / name, KEPT / name)
    clip = run / files.read_json(run / "transcripts.json")[0]["path"]
    _save(plots.clip_strip(read_video(clip), read_audio(audio_path(clip))), "clip.png")


def draw() -> None:
    evaluation = files.read_json(KEPT / "evaluation.json")
    test = [row for row in evaluation["rows"] if row["labels"] == "test"]
    _save(plots.wer_against_snr(test, evaluation["guess_per_slot"]), "wer.png")


def section() -> str:
    """The README's text between the markers."""
    output = (KEPT / "output.txt").read_text().strip()
    demo, clip = files.read_json(KEPT / "demo.json"), files.read_json(KEPT / "transcripts.json")[0]
    heard = "\n".join(f"| {h['condition']} | {h['text'] or '(nothing)'} |" for h in clip["hypotheses"])
    train, test, machine = demo["train_clips"], demo["test_clips"], demo["facts"]["machine"]
    return f"""`make demo-full` trains a small DEDR model from scratch on {train} synthetic talking-head clips
(espeak-ng speech, drawn faces) and scores it on {test} clips of sentences it never saw. It printed, on {machine}:

```
{output}
```

One seed. Length and curriculum of the training were chosen by the rates on these same test clips, and a shorter one was
clearly worse: read them as what this demo does, not as an estimate for new data.

The demo also wrote a report with pictures; here are two. Word error rate in babble, listening, reading lips, and both:

![Word error rate against SNR](docs/demo/wer.png)

![Frames and sound of a clip](docs/demo/clip.png)

| said | {clip["reference"]} |
|---|---|
{heard}
"""


def update(readme: Path) -> None:
    """Put the section between the README's markers."""
    head, rest = readme.read_text().split(BEGIN)
    _, tail = rest.split(END)
    files.write_text(readme, f"{head}{BEGIN}\n{section().rstrip()}\n{END}{tail}")


def _save(figure, name: str) -> None:
    figure.savefig(KEPT / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    draw()
    update(ROOT / "README.md")
