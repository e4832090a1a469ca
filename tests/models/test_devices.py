"""Where accelerate may cut the model in pieces for several devices."""

import pytest
from accelerate import infer_auto_device_map

WHOLE = ("ResidualBlock", "HubertPositionalConvEmbedding", "SMoPProjector", "WhisperEncoderLayer", "LlamaDecoderLayer")


@pytest.mark.parametrize("name", WHOLE)
def test_what_adds_its_input_or_holds_its_parameters_itself_stays_whole(model, name):
    module_names = [n for n, m in model.named_modules() if type(m).__name__ == name]
    assert module_names
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for share in range(1, 100):
        limits = {"cpu": total * share // 100, "disk": 10 * total}
        places = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
        cut = [n for n in module_names if any(key.startswith(f"{n}.") for key in places)]
        assert cut == [], f"with {share}% of the memory on the first device {cut[0]} is cut in two"
