"""Convert fairseq's AV-HuBERT: the video tower by itself, as a folder that `from_pretrained` reads."""

from pathlib import Path

from llama_smop.models import seal
from llama_smop.models.formats.fairseq import load_avhubert
from llama_smop.models.formats.key_map import KeyReport
from llama_smop.system import files

ACCOUNT = "conversion.json"


def convert_avhubert(source: str | Path, to: str | Path, *, partial: bool = False) -> KeyReport:
    """Write the video tower of a fairseq file to a folder, with `conversion.json`, the account of every key.

    Raises:
        FileNotFoundError, ValueError: see `load_avhubert`. OSError: `to` cannot be written (`seal.check_target`).
    """
    tower, report = load_avhubert(source, partial=partial)
    account = {"source": str(source), "keys": report.to_dict()}

    def write(folder: Path) -> None:
        tower.save_pretrained(folder)
        files.write_json(folder / ACCOUNT, account)

    seal.write_sealed(to, write)
    return report
