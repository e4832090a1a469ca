"""A self-contained HTML page with its style and pictures embedded."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llama_smop.data.media import MediaError
from llama_smop.evaluation.wer import per_cent, snr_label, snr_order
from llama_smop.system import files

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead, figcaption, small { color: #555; }
figure { margin: 1rem 0 1.6rem; }
img { max-width: 100%; display: block; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: #2c6e36; } .wrong { color: #b3261e; text-decoration: underline; }
code { background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: #f3f3f3; padding: .8rem; border-radius: 3px; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    return files.write_text(path, page)


def picture(figure: Figure, caption: str) -> str:
    """The figure as a PNG with `caption`, plain text, below it. Closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return png(buffer.getvalue(), caption)


def png(content: bytes, caption: str) -> str:
    """A PNG file with `caption`, plain text, below it."""
    caption, data = html.escape(caption), base64.b64encode(content).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


@contextmanager
def shown(path: Path) -> Iterator[None]:
    """While open, errors in a part of the page are blamed on the JSON file that it shows.

    Raises:
        ValueError: the file has other content than it should; one line that names the file and the key.
    """
    try:
        yield
    except MediaError:  # the clip is at fault, not the JSON file
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        plt.close("all")
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be shown, its content is not what was written there ({reason})") from None


def facts(items: Mapping[str, object]) -> str:
    """A table of names and values, both plain text."""
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in items.items())
    return f"<table>{rows}</table>"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def wer_table(rows: Sequence[Mapping], names: Mapping[str, str]) -> str:
    """Word error rates of `evaluation.run.Row`s: a line for each clips, modality, rate and picture, a column for
    each SNR.

    names: names of label files on the page, where they differ.
    """
    from llama_smop.reports import plots

    snrs = sorted({r["snr"] for r in rows}, key=snr_order)
    head = "".join(f'<th class="number">{snr_label(s)}</th>' for s in snrs)
    lines = []
    degraded, several = (any(r.get(key) is not None for r in rows) for key in ("degradation", "rate"))
    keys = ("labels", "modality", "rate", "degradation")
    for condition in dict.fromkeys(tuple(map(r.get, keys)) for r in rows):
        found = {r["snr"]: r["wer"] for r in rows if tuple(map(r.get, keys)) == condition}
        labels, modality, rate, worse = condition
        shown = ("" if found.get(s) is None else f"{per_cent(found[s])} %" for s in snrs)
        cells = "".join(f'<td class="number">{rate}</td>' for rate in shown)
        name, heard = (
            html.escape(str(text)) for text in (names.get(labels, labels), plots.NAMES.get(modality, modality))
        )
        picture = f"<td>{html.escape(str(worse or 'as it is'))}</td>" if degraded else ""
        at = f"<td>{html.escape(str(rate or ''))}</td>" if several else ""
        lines.append(f"<tr><td>{name}</td><td>{heard}</td>{at}{picture}{cells}</tr>")
    head = ("<th>rate</th>" if several else "") + ("<th>picture</th>" if degraded else "") + head
    return f"<table><tr><th>clips</th><th>input</th>{head}</tr>{''.join(lines)}</table>"
