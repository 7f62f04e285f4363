"""Prompts of previews, and the files they come in."""

import json

import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.training.prompts import Preview, Prompt, encode_prompts, parse_lines, read_prompts

WAN = FAMILIES["wan"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", Prompt(prompt="a cat")),
        ("a cat --w 64 --h 32 --f 5 --d 7 --s 3", Prompt(prompt="a cat", width=64, height=32, frame_count=5, seed=7, sample_steps=3)),
        ("a cat --L 4.5 --FS 3", Prompt(prompt="a cat", cfg_scale=4.5, discrete_flow_shift=3.0)),
        ("a cat --n ugly, w 5 --d 1", Prompt(prompt="a cat", negative_prompt="ugly, w 5", seed=1)),
        ("a cat --n", Prompt(prompt="a cat", negative_prompt="")),
        ("a cat --g 6", Prompt(prompt="a cat", guidance_scale=6.0)),
        ("a cat --i in/start.png --ei end.png", Prompt(prompt="a cat", image_path="in/start.png", end_image_path="end.png")),
        # Whatever is no option belongs to the prompt.
        ("I walk to D 5 cats, N a dog", Prompt(prompt="I walk to D 5 cats, N a dog")),
        ("a sign that says --hello -- w 5 --w 64", Prompt(prompt="a sign that says --hello -- w 5", width=64)),
        ("well--w 5 known --h 32", Prompt(prompt="well--w 5 known", height=32)),
    ],
)  # fmt: skip
def test_options_stand_behind_the_prompt_and_the_prompt_may_hold_any_words(line, expected):
    assert parse_lines(line) == [expected]


def test_comments_and_empty_lines_are_passed_over():
    assert [one.prompt for one in parse_lines("# a comment\n\n  \na cat\n  # another --w\na # dog")] == [
        "a cat",
        "a # dog",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --w", "'' behind --w is not a whole number"), ("a cat --w 64.5", "'64.5' behind --w"),
        ("a cat --s 5 blue", "'5 blue' behind --s"), ("a cat --l five", "'five' behind --l is not a number"),
        ("a cat --w 64 --width 5", "'64 --width 5' behind --w"), ("a cat --w 64 --w 32", "--w is there twice"),
        ("--w 64", "there is no prompt"), ("a cat --ci start.png", "'control_image_path' cannot be used"),
        ("a cat --g six", "'six' behind --g is not a number"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_understood_is_refused_with_its_line(line, message):
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        parse_lines(f"fine\n{line}")


def test_all_kinds_of_files_give_the_same_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --s 3 --l 2\na dog --w 32 --s 3 --l 2\n")
    (tmp_path / "prompts.toml").write_text(
        "[prompt]\nwidth = 64\nsample_steps = 3\ncfg_scale = 2\n"
        '[[prompt.subset]]\nprompt = "a cat"\n[[prompt.subset]]\nprompt = "a dog"\nwidth = 32\n'
    )
    dog = {"prompt": "a dog", "width": 32, "sample_steps": 3, "cfg_scale": 2}
    (tmp_path / "prompts.json").write_text(json.dumps(["a cat --w 64 --s 3 --l 2", dog]))
    lines, *others = (read_prompts(tmp_path / f"prompts.{suffix}") for suffix in ("txt", "toml", "json"))
    assert [one.width for one in lines] == [64, 32] and others == [lines, lines]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '{"prompt": "a cat"}', "a list of prompts"), ("x.json", "[1]", "must be a text or an object"),
        ("x.json", '[{"prompt": "a", "widht": 5}]', "unknown entry 'widht'"),
        ("x.json", '[{"prompt": "a", "width": "5"}]', "'width' is '5', and must be a number"),
        ("x.json", '[{"prompt": "a", "width": true}]', "'width' is True"), ("x.json", "[", "x.json: "),
        ("x.json", '[{"width": 5}]', "there is no prompt"), ("x.toml", 'prompt = "a"', r"\[\[prompt.subset\]\]"),
        ("x.toml", "[prompt]\nwidth = 5", r"\[\[prompt.subset\]\]"), ("x.yaml", "", "no prompt file"),
        ("x.json", '[{"prompt": "a", "control_image_path": "b"}]', "cannot be used"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_understood_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_prompt_keeps_its_choices_and_takes_the_others():
    given = Prompt(prompt="a cat", seed=0, negative_prompt="")
    defaults = Prompt(prompt="", negative_prompt="ugly", width=64, seed=5)
    assert given.filled(defaults) == Prompt(prompt="a cat", negative_prompt="", width=64, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"shift": 0.0}, {"solver": "magic"}, {"guidance": float("nan")}, {"seed": -1}]
)
def test_previews_that_cannot_be_sampled_are_refused(wrong):
    values = {"prompt": "a", "states": "", "negative_states": "", "width": 32, "height": 32, "frames": 1, "seed": 0,
              "steps": 2, "guidance": 1.0, "shift": 3.0}  # fmt: skip
    Preview(**values)
    with pytest.raises(ValueError, match="use"):
        Preview(**values | wrong)


def test_prompts_are_encoded_once_for_each_text_encoder(tmp_path):
    class Encoder:
        asked = []

        def encode(self, texts):
            self.asked += texts
            return [{"varlen_t5": torch.full((2, 8), float(len(text)))} for text in texts]

    first = encode_prompts(["a", "bb", "a"], tmp_path, WAN, "one", Encoder)
    again = encode_prompts(["bb", "ccc"], tmp_path, WAN, "one", Encoder)
    other = encode_prompts(["a"], tmp_path, WAN, "two", Encoder)
    assert Encoder.asked == ["a", "bb", "ccc", "a"]
    assert again["bb"] == first["bb"] and other["a"] != first["a"]

    def never():
        raise AssertionError("the encoder was loaded for nothing")

    assert encode_prompts(["a", "bb"], tmp_path, WAN, "one", never) == first
