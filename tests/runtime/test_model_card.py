from importlib.metadata import version

import pytest
from huggingface_hub import ModelCard

from etude.runtime.model_card import write_model_card


def test_the_hub_can_read_it(tmp_path):
    path = write_model_card(
        tmp_path / "new" / "folder",
        model_name="Calculator",
        trainer="SFTTrainer",
        method="sft",
        base_model="someone/tiny-llama",
        config_summary={"learning_rate": 2e-5, "stop": "a|b"},
        datasets=["someone/sums"],
        tags=["tools", "etude"],
        license="mit",
        language="en",
    )
    card = ModelCard.load(path)
    assert card.data.tags == ["etude", "sft", "tools"]
    assert (card.data.base_model, card.data.datasets) == ("someone/tiny-llama", ["someone/sums"])
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert card.text.strip().startswith("# Calculator")
    assert "| learning_rate | `2e-05` |" in card.text
    assert "| stop | `a\\|b` |" in card.text
    assert f"| torch | `{version('torch')}` |" in card.text


@pytest.mark.parametrize("exists", [True, False])
def test_no_path_of_the_machine_gets_in(tmp_path, exists):
    base = tmp_path / "secret" / "runs" / "tiny"
    if exists:
        base.mkdir(parents=True)
    path = write_model_card(tmp_path, model_name="m", trainer="T", method="sft", base_model=str(base))
    assert "secret" not in path.read_text()
    assert "from `tiny`" in path.read_text()
    assert ModelCard.load(path).data.base_model is None


def test_what_is_not_known_is_left_out(tmp_path):
    path = write_model_card(tmp_path, model_name="Überé", trainer="T", method="ppo")
    text = path.read_text(encoding="utf-8")
    assert "# Überé\n\nTrained with `T` of Étude.\n\n## Versions" in text
    for absent in ("base_model", "datasets:", "license", "Settings", "null"):
        assert absent not in text
