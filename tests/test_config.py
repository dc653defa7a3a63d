"""Configuration: presets, layering, refusals with the nearest key, and fuzzing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.config import PRESETS, RunConfig, load_config, validate_config
from lgcnet_fast.errors import ConfigError


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, "smoke", overrides)
    return str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    assert isinstance(load_config(preset=preset), RunConfig)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_keeps_every_value(preset: str) -> None:
    config = load_config(preset=preset)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_defaults_are_the_recipe_of_the_paper() -> None:
    config = load_config(preset="paper")
    assert config.seeds == (0, 1, 2, 3, 4)
    assert (config.search.epochs, config.search.batch_size, config.search.beta) == (150, 16, 0.005)
    assert (config.search.temperature_start, config.search.temperature_end) == (1.0, 0.03)
    assert (config.finetune.epochs, config.finetune.batch_size) == (200, 8)
    assert config.evaluate.size == config.latency.size == (769, 1537)


def test_a_named_backend_is_strict_already() -> None:
    assert load_config(preset="smoke", overrides=("backend=cuda",)).backend == "cuda"
    assert "strict_backend is for backend" in refusal("backend=triton", "strict_backend=true")
    assert "backend" in refusal("backend=cublas")


def test_override_beats_file_beats_preset(tmp_path: Path) -> None:
    path = write(tmp_path, "[search]\nepochs = 7\nbatch_size = 2\n")
    config = load_config(path, "smoke", ("search.epochs=9",))
    assert (config.search.epochs, config.search.batch_size) == (9, 2)
    assert config.search.augmentation.crop == (97, 97)


def test_overrides_are_toml_values_or_bare_strings() -> None:
    config = load_config(
        preset="smoke",
        overrides=("seeds=[3, 4]", "search.augmentation.crop=[33, 65]", "precision=bf16",
                   'latency.table="roofline_titanxp"', "finetune.ema=0.99", "space.head=aspp"),
    )  # fmt: skip
    assert config.seeds == (3, 4)
    assert config.search.augmentation.crop == (33, 65)
    assert (config.precision, config.finetune.ema) == ("bf16", 0.99)
    assert config.space["head"] == "aspp"


def test_image_is_the_size_of_each_image() -> None:
    assert load_config(preset="smoke", overrides=("evaluate.size=image",)).evaluate.size is None


def test_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseeds = [5]\n")
    assert load_config(path, "smoke").seeds == (5,)


def test_relative_paths_are_meant_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path,
        'genotype = "g.json"\n[data]\nname = "camvid"\nroot = "camvid"\n'
        '[latency]\ntable = "tables/t.json"\n[pretrain]\ndata = "../classes"\n',
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(path, "smoke", ("data.cache_dir=cache",))
    assert config.data.root == tmp_path / "camvid"
    assert config.latency.table == str(tmp_path / "tables" / "t.json")
    assert config.pretrain.data == tmp_path.parent / "classes"
    assert config.genotype == str(tmp_path / "g.json")
    assert config.data.cache_dir == elsewhere / "cache"


def test_a_plug_in_space_keeps_none_of_the_preset_options(tmp_path: Path) -> None:
    path = write(tmp_path, '[space]\nname = "package.module:Space"\nwidth = 8\n')
    assert load_config(path, "smoke").space == {"name": "package.module:Space", "width": 8}
    overrides = ("space.width=8", "space.name=package.module:Space")
    for order in (overrides, overrides[::-1]):
        assert load_config(preset="smoke", overrides=order).space["width"] == 8
    assert load_config(preset="smoke", overrides=("space.name=gas",)).space["cells"] == 4


def test_a_shipped_genotype_is_no_path() -> None:
    assert load_config(preset="smoke", overrides=("genotype=reference",)).genotype == "reference"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("serch.epochs=3", ("'serch'", "did you mean 'search'")),
        ("search.epoch=3", ("'search.epoch'", "did you mean 'epochs'")),
        ("search.augmentation.crp=[9, 9]", ("'search.augmentation.crp'", "'crop'")),
        ("epochs=3", ("'epochs'", "valid here", "search")),
        ("search.epochs=0", ("search.epochs", "given 0")),
        ("search.epochs=true", ("search.epochs", "given True")),
        ("search.epochs=many", ("search.epochs", "given 'many'")),
        ("search.augmentation.flip=no", ("search.augmentation.flip",)),
        ("search.augmentation.scale=[2.0, 0.5]", ("search.augmentation", "(low, high)")),
        ("search.augmentation.crop=[9]", ("search.augmentation.crop",)),
        ("search.temperature_end=2", ("search", "temperature_end")),
        ("search.min_fps=100", ("search", 'strategy = "random"')),
        ("search.beta=inf", ("search.beta",)),
        ("search.beta=nan", ("search.beta",)),
        ("search.arch_betas=[0.5, 1.0]", ("search.arch_betas",)),
        ("search=3", ("search",)),
        ("data.name=cityscape", ("data.name", "cityscapes")),
        ("data.name=camvid", ("data.root",)),
        ("device=gpu", ("device", "cuda:N")),
        ("data.train_splits=[]", ("data.train_splits",)),
        ("seeds=[]", ("seeds",)),
        ("seeds=[1, 1]", ("seeds", "differ")),
        ("seeds=[-1]", ("seeds",)),
        ("evaluate.protocols=[]", ("evaluate.protocols",)),
        ("evaluate.size=[0, 9]", ("evaluate.size",)),
        ("data.root=~nobody-of-this-name/x", ("~nobody-of-this-name",)),
        ("search.epochs", ("section.key=value",)),
        ("=3", ("section.key=value",)),
        ("search..epochs=3", ("section.key=value",)),
    ],
)
def test_refusals_name_the_key_and_the_remedy(override: str, parts: tuple[str, ...]) -> None:
    message = refusal(override)
    assert all(part in message for part in parts), message


def test_every_fault_is_named_at_once() -> None:
    message = refusal("search.epoch=3", "finetune.lr=-1")
    assert "search.epoch" in message and "finetune.lr" in message


def test_long_values_are_shortened() -> None:
    assert len(refusal("search.epochs=" + "x" * 10_000)) < 300


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'smoke'"):
        load_config(preset="smok")


def test_unreadable_files(tmp_path: Path) -> None:
    assert "missing.toml" in refusal(path=tmp_path / "missing.toml")
    assert str(tmp_path) in refusal(path=tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "binary.toml" in refusal(path=binary)


@pytest.mark.parametrize("text", ["seeds = ", "a" + "=[" * 20_000, "seeds = [" + "9" * 5_000 + "]"])
def test_text_that_is_not_toml_names_the_file(tmp_path: Path, text: str) -> None:
    assert "run.toml: not valid TOML" in refusal(path=write(tmp_path, text))


keys = st.sampled_from(["seeds", "search", "data", "epochs", "crop", "augmentation", "", "x", "é"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=9),
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)
sections = st.sampled_from([*RunConfig.model_fields, "other"])


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(sections, trees | st.dictionaries(st.text(max_size=9), trees)))
def test_any_values_are_a_config_or_a_config_error(values: dict[str, object]) -> None:
    try:
        assert isinstance(validate_config(values, "fuzz"), RunConfig)
    except ConfigError as error:
        assert str(error).startswith("fuzz: ")


toml_words = st.sampled_from(
    ["[search]", "[data]", "[[search]]", "seeds", "epochs", "=", "[", "]", "{", "}", ",", "\n", " ",
     "1", "-1", "nan", "1e400", '"', "'", "#", ".", "name", '"synthetic"', "true", "2020-01-01"]
)  # fmt: skip
toml_texts = st.one_of(st.text(max_size=80), st.lists(toml_words, max_size=20).map(" ".join))


@settings(max_examples=150, deadline=None)
@given(text=toml_texts)
def test_any_file_is_a_config_or_a_config_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load_config(path, "smoke"), RunConfig)
        except ConfigError as error:
            assert "fuzz.toml" in str(error)


override_keys = st.sampled_from(
    ["seeds", "search.epochs", "search.augmentation.crop", "data.root", "space.cells", "space",
     "latency.table", "genotype", "evaluate.size", "pretrain.data", "data.cache_dir"]
)  # fmt: skip
override_texts = st.one_of(
    st.text(max_size=40),
    st.builds("{}={}".format, override_keys, st.one_of(toml_texts, scalars.map(str))),
)


@settings(max_examples=200, deadline=None)
@given(overrides=st.lists(override_texts, min_size=1, max_size=3))
def test_any_override_is_a_config_or_a_config_error(overrides: list[str]) -> None:
    try:
        assert isinstance(load_config(preset="smoke", overrides=tuple(overrides)), RunConfig)
    except ConfigError as error:
        assert str(error)
