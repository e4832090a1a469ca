"""`save_pretrained` and `from_pretrained`: what can be fetched again is left out, what does not fit is refused."""

import inspect
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llama_smop.models import fit, hub, partial_checkpoint

OF_PUSHING = ("repo_id", "commit_message", "create_pr")


class CheckpointMixin:
    """Before `PreTrainedModel` among a model's bases."""

    def save_pretrained(
        self, save_directory, *, complete: bool | None = None, state_dict=None, push_to_hub: bool = False, **kwargs
    ) -> None:
        """Save whole, or with `config.sources` (and not `complete`) only what cannot be fetched again: what is
        trained, and the special tokens' embeddings. Written aside, then renamed: a full disk leaves the old files;
        weights of an earlier save that the new ones do not replace are removed."""
        state = self.state_dict() if state_dict is None else state_dict
        rows = None
        if self.config.sources and not complete:
            rows = partial_checkpoint.special_token_rows(self, state)
            state = partial_checkpoint.without_fetched_parts(self, state)
        own = inspect.signature(PreTrainedModel.save_pretrained).parameters
        saving = {k: v for k, v in kwargs.items() if k in own}
        pushing = {k: v for k, v in kwargs.items() if k not in own or k == "token"}
        with partial_checkpoint.written_aside(save_directory) as folder:
            super().save_pretrained(folder, state_dict=state, **saving)
            if rows is not None:
                save_file(rows, folder / partial_checkpoint.SPECIAL_TOKENS_FILE)
            written = {file.name for file in folder.iterdir()}
        partial_checkpoint.remove_stale_weights(Path(save_directory), written, kwargs.get("variant"))
        if push_to_hub and kwargs.get("is_main_process", True):
            pushing.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
            hub.upload(Path(save_directory), written, tags=self.model_tags, **pushing)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """transformers' `from_pretrained`; parts that the checkpoint leaves out come from `config.sources`.

        Raises:
            ValueError: a checkpoint that is damaged, lacks weights, has others, holds numbers that are not finite, or
                disagrees with its config.
        """
        kwargs["ignore_mismatched_sizes"] = True
        source = hub.Source(pretrained_model_name_or_path, kwargs)
        if "config" not in kwargs:
            fit.check_folder(cls, source)
        try:
            with partial_checkpoint.quiet_load_report():
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: model.safetensors is truncated or damaged ({error}); copy it again"
            ) from None
        partial_checkpoint.complete(model, info, source)
        model.freeze()
        return (model, info) if output_loading_info else model
