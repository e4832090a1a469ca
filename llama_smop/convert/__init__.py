"""Convert other projects' checkpoints: the authors' state dicts and fairseq's AV-HuBERT."""

from pathlib import Path

from llama_smop.models.formats.key_map import KeyReport
from llama_smop.models.seal import check_target


def convert(source: str | Path, to: str | Path, *, partial: bool = False, **settings) -> KeyReport:
    """Make a folder of `source`: a whole model from a Llama-SMoP or Llama-AVSR state dict, a video tower from a
    fairseq AV-HuBERT file. `settings` are `convert_authors`'; a video tower takes none.

    Raises:
        OSError: `to` cannot be written (`seal.check_target`); checked first.
        FileNotFoundError, ValueError: see `load_checkpoint`, `convert_authors` and `load_avhubert`.
    """
    from llama_smop.convert.authors import convert_authors
    from llama_smop.convert.avhubert import convert_avhubert
    from llama_smop.models.formats.fairseq import is_avhubert
    from llama_smop.models.formats.safe_load import load_checkpoint, state_dict_of

    check_target(to)
    if is_avhubert(state_dict_of(load_checkpoint(source), source)):
        return convert_avhubert(source, to, partial=partial)
    if settings.get("language_model") is None:
        raise ValueError(f"{source}: say which language model it was trained from (--language-model NAME or FOLDER)")
    return convert_authors(source, to, partial=partial, **settings)


__all__ = ["KeyReport", "convert"]
