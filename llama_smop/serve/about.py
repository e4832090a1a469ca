"""What a page says of its model."""

from collections.abc import Sequence

from llama_smop.data.synthetic.grammar import GRID
from llama_smop.models.tokenizer import PROMPTS
from llama_smop.serve.service import Service

SMALL = 1000  # words of a vocabulary that is a list of words


def described(service: Service) -> str:
    """One line: what the model is made of."""
    config = service.model.config
    projector = config.projector_config
    parts = [" + ".join({"audio": "sound", "video": "lips"}[name] for name in config.modalities)]
    if projector.kind == "smop":
        parts.append(f"{projector.sharing}, {projector.num_experts} experts, {projector.top_k} chosen")
    else:
        parts.append("a dense projector")
    parts.append(f"{sum(p.numel() for p in service.model.parameters()) / 1e6:.3g} million parameters")
    return " · ".join(parts)


def caution(service: Service) -> str | None:
    """What a model with a small vocabulary of words cannot do; None for others."""
    prompts = {word.lower() for prompt in PROMPTS.values() for word in prompt.split()}
    tokenizer = service.processor.tokenizer
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - prompts
    words = {word for word in words if not word.startswith("<")}
    if len(words) > SMALL:
        return None
    grid = {word for _, slot in GRID.slots for word in slot}
    if words == grid:
        example = " ".join(slot[0] for _, slot in GRID.slots)
        slots = ", ".join(name for name, _ in GRID.slots)
        return (
            f"This is the demo's model. It knows only its toy grammar of {len(grid)} words: {slots}, "
            f"as in “{example}”. To whatever else it is shown it answers in these words."
        )
    return f"This model knows {len(words)} words and no others: {_some(sorted(words))}."


def _some(words: Sequence[str], most: int = 20) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")
