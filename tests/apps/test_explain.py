"""explain and schema, on the recipes that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmtrainer as lt
from llmtrainer.base.config import dump, load
from llmtrainer.base.errors import UserError

ROOT = Path(lt.__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_loads_dumps_and_is_explained(path: Path, tmp_path: Path) -> None:
    recipe = load(lt.Recipe, path)
    (tmp_path / "r.yaml").write_text(dump(recipe))
    assert load(lt.Recipe, tmp_path / "r.yaml") == recipe
    told = lt.explain(lt.Explanation(recipe=str(path))).keys
    assert all(entry.help and entry.type for entry in told)
    lines = path.read_text().splitlines()
    for entry in told:
        if entry.origin != "default":
            name = [part for part in entry.key.split(".") if not part.isdecimal()]
            line = lines[int(entry.origin.rpartition(":")[2]) - 1]
            assert any(part in line for part in name), entry


def test_a_key_a_part_and_a_kind_can_be_asked_for() -> None:
    told = lt.explain(lt.Explanation(key="optim.clip"))
    assert [entry.key for entry in told.keys] == ["optim.clip"]
    assert len(lt.explain(lt.Explanation(key="optim")).keys) > 3
    kind = lt.explain(lt.Explanation(key="objective.kind"))
    assert kind.text().endswith("llmtrainer/objectives/causal_lm.py")
    changed = lt.explain(lt.Explanation(recipe=str(RECIPES[0]), key="seed", overrides=("seed=7",)))
    assert changed.json()["keys"][0]["origin"] == "command line" and changed.json()["keys"][0]["value"] == 7
    assert "<- command line" in changed.text()


def test_what_does_not_exist_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        lt.explain(lt.Explanation(key="optim.clp"))
    assert caught.value.fix == "did you mean `optim.clip`?"
    with pytest.raises(UserError, match="there is no verb `trian`"):
        lt.schema(lt.SchemaRequest(verb="trian"))


def test_the_schema_of_a_recipe_is_json_with_every_kind_and_every_help() -> None:
    found = lt.schema(lt.SchemaRequest())
    assert json.loads(found.text()) == found.json()
    assert set(found.json()["properties"]) == set(lt.Recipe.model_fields)
    for item in found.json()["properties"].values():
        # A field whose help is that of its part is left to the part by pydantic.
        part = found.json()["$defs"].get(item.get("$ref", "").rpartition("/")[2], {})
        assert item.get("description") or part.get("description")
    kinds = found.json()["$defs"]["Objective"]["oneOf"]
    assert "causal_lm" in [item["properties"]["kind"].get("const") for item in kinds]
