import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from megatron_opd.config import Data
from megatron_opd.data import (
    PromptStream,
    encode_response,
    load_prompts,
    same_tokenizer,
    vocab_size,
)
from megatron_opd.types import Prompt
from tests.tokenizers import train_tokenizer

DAPO = Path(__file__).parents[2] / "shared" / "data" / "dapo-math-17k-boxed.parquet"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tok"))


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def section(*files, **changes):
    return Data(prompts=files, **changes)


def load_line(data, tokenizer, **kwargs):
    """The one line with which the prompts are refused."""
    with pytest.raises(ValueError) as raised:
        load_prompts(data, tokenizer, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_verl_rows_in_both_formats(tmp_path, tokenizer, suffix):
    rows = [
        {
            "data_source": "math",
            "prompt": [{"role": "user", "content": f"what is {i}+1?"}],
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        }
        for i in range(3)
    ]
    file = write(tmp_path / f"a.{suffix}", rows)
    prompts = load_prompts(section(file), tokenizer, require=("answer",))
    assert [p.answer for p in prompts] == ["1", "2", "3"]
    assert [p.source for p in prompts] == ["math"] * 3
    expected = "<|im_start|>user\nwhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[1].text == expected
    assert tokenizer.decode(list(prompts[1].token_ids)) == expected
    assert prompts[1].token_ids[0] == 1  # the special token, not its characters
    assert prompts[1].token_ids == tuple(
        tokenizer.apply_chat_template(
            rows[1]["prompt"], add_generation_prompt=True, return_dict=False
        )
    )


def test_plain_rows_and_messages_and_mixing(tmp_path, tokenizer):
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "q", "answer": 42.0, "response": "r"}])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    talk = write(tmp_path / "talk.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    prompts = load_prompts(section(plain, talk), tokenizer)
    assert [p.index for p in prompts] == [0, 1, 2]
    assert [p.source for p in prompts] == ["plain", "talk", "talk"]
    assert [p.answer for p in prompts] == ["42.0", None, None]
    assert [p.response for p in prompts] == ["r", "there", None]
    assert prompts[1].token_ids == prompts[2].token_ids


def test_keys_enter_nested_columns(tmp_path, tokenizer):
    row = {"extra": {"q": "hello", "a": 7}, "gold.text": "fine"}
    data = section(
        write(tmp_path / "a.jsonl", [row]),
        prompt_key="extra.q",
        answer_key="extra.a",
        response_key="gold.text",
    )
    (prompt,) = load_prompts(data, tokenizer)
    assert "hello" in prompt.text and (prompt.answer, prompt.response) == ("7", "fine")


def test_without_a_template_the_text_is_the_prompt(tmp_path):
    tokenizer = train_tokenizer(tmp_path, chat=False)
    file = write(tmp_path / "a.jsonl", [{"prompt": "<|im_start|>2+2="}])
    (prompt,) = load_prompts(section(file, chat_template="none"), tokenizer)
    assert prompt.text == "<|im_start|>2+2=" == tokenizer.decode(list(prompt.token_ids))
    assert prompt.token_ids[0] == 1 and len(prompt.token_ids) == 5
    line = load_line(section(file), tokenizer)
    assert "has no chat template; set data.chat_template=none" in line


def test_a_beginning_token_is_added_to_plain_text_and_not_to_a_template(tmp_path):
    tokenizer = train_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    file = write(tmp_path / "a.jsonl", [{"prompt": "q"}])
    (plain,) = load_prompts(section(file, chat_template="none"), tokenizer)
    (chat,) = load_prompts(section(file), tokenizer)
    assert plain.token_ids[0] == 0 and len(plain.token_ids) == 2
    assert chat.token_ids[0] == 1 and 0 not in chat.token_ids
    assert encode_response(tokenizer, "q")[0] != 0


def test_template_variables_reach_the_template_or_are_refused(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"prompt": "q"}])
    data = section(file, chat_template_kwargs={"enable_thinking": False})
    (prompt,) = load_prompts(data, tokenizer)
    assert prompt.text.endswith("</think>\n\n")
    line = load_line(section(file, chat_template_kwargs={"enable_thinkin": False}), tokenizer)
    assert line.startswith("data.chat_template_kwargs.enable_thinkin:")


def test_long_prompts_are_refused_or_dropped_and_counted(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "x" * n} for n in (3, 60, 4, 90)]
    file = write(tmp_path / "a.jsonl", rows)
    limit = len(load_prompts(section(file), tokenizer)[2].token_ids)  # exactly the limit stays
    line = load_line(section(file, max_prompt_tokens=limit), tokenizer)
    assert f"2 of 4 prompts are longer than data.max_prompt_tokens={limit}" in line
    assert f"{limit + 86} tokens ({file}, row 3)" in line and "data.too_long=drop" in line
    dropping = section(file, max_prompt_tokens=limit, too_long="drop")
    with caplog.at_level(logging.WARNING):
        kept = load_prompts(dropping, tokenizer)
    assert [p.index for p in kept] == [0, 2]
    assert "2 of 4 prompts" in caplog.text
    tiny = section(file, max_prompt_tokens=2, too_long="drop")
    assert "none is left" in load_line(tiny, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("absent.jsonl", None, "no such file"),
        ("a.csv", "q", "expected a .parquet or .jsonl file"),
        ("empty.jsonl", "", "empty, expected at least one row"),
        ("a.parquet", "no parquet", "not a parquet file"),
        ("a.jsonl", '{"prompt": "q"}\n{"prompt"', "row 1: not JSON"),
        ("a.jsonl", '"q"\n', "row 0: expected an object"),
        ("a.jsonl", '{"question": "q"}\n', "row 0: data.prompt_key='prompt' gives 'None'"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}\n', "expected a string or a list of {role"),
    ],
)
def test_files_that_are_refused(tmp_path, tokenizer, name, content, line):
    if content is not None:
        (tmp_path / name).write_text(content)
    answer = load_line(section(str(tmp_path / name)), tokenizer)
    assert line in answer and name in answer


def test_what_the_template_refuses_names_its_row(tmp_path):
    tokenizer = train_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    file = write(tmp_path / "a.jsonl", [{"prompt": "q"}])
    assert "row 0: the chat template refuses it: no system" in load_line(section(file), tokenizer)


def test_required_columns(tmp_path, tokenizer):
    rows = [{"prompt": "q", "response": "r"}, {"prompt": "q", "response": None}]
    file = write(tmp_path / "a.jsonl", rows)
    assert len(load_prompts(section(file), tokenizer)) == 2
    line = load_line(section(file), tokenizer, require=("response",))
    assert "row 1: no response; set data.response_key" in line


def test_a_response_ends_once(tokenizer):
    ids = encode_response(tokenizer, "<|im_start|>ok")
    assert ids[0] == 1 and ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(list(ids)) == "<|im_start|>ok<|im_end|>"
    assert encode_response(tokenizer, "<|im_start|>ok<|im_end|>") == ids
    assert encode_response(tokenizer, "") == (2,)


def numbered(count):
    return [Prompt(index, (index,), "") for index in range(count)]


@given(
    takes=st.lists(st.integers(1, 7), max_size=6),
    cut=st.integers(0, 6),
    shuffle=st.booleans(),
)
def test_a_resumed_stream_continues_exactly(takes, cut, shuffle):
    prompts = numbered(7)
    whole = PromptStream(prompts, seed=3, shuffle=shuffle)
    expected = [whole.take(n) for n in takes]
    first, second = (PromptStream(prompts, seed=3, shuffle=shuffle) for _ in range(2))
    seen = [first.take(n) for n in takes[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert seen + [second.take(n) for n in takes[cut:]] == expected


@given(size=st.integers(2, 9), step=st.integers(1, 9), shuffle=st.booleans())
def test_a_pass_has_no_prompt_twice_and_leaves_out_less_than_a_step(size, step, shuffle):
    step = min(step, size)
    stream = PromptStream(numbered(size), seed=0, shuffle=shuffle)
    for epoch in range(3):
        drawn = [p.index for _ in range(size // step) for p in stream.take(step)]
        assert stream.epoch == epoch
        assert len(set(drawn)) == len(drawn) > size - step
        assert shuffle or drawn == sorted(drawn)


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "hi"}]])
def test_a_conversation_without_a_question_is_refused(tmp_path, messages):
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}))
    data = Data(prompts=(str(tmp_path / "p.jsonl"),))
    with pytest.raises(ValueError, match=r"p.jsonl, row 0: no message that the student could"):
        load_prompts(data, train_tokenizer(tmp_path / "tokenizer"))


def test_orders_differ_between_epochs_and_seeds_and_repeat_for_one_seed():
    def orders(seed):
        stream = PromptStream(numbered(50), seed, shuffle=True)
        return [[p.index for p in stream.take(50)] for _ in range(2)]

    assert orders(1) == orders(1)
    assert len({tuple(order) for order in orders(1) + orders(2)}) == 4


def test_a_stream_over_other_data_is_refused():
    state = PromptStream(numbered(5), seed=0, shuffle=False).state_dict()
    with pytest.raises(ValueError, match=r"number of prompts is 6, .* taken with 5"):
        PromptStream(numbered(6), seed=0, shuffle=False).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 1"):
        PromptStream(numbered(5), seed=1, shuffle=False).load_state_dict(state)
    others = [replace(prompt, token_ids=(9, 9)) for prompt in numbered(5)]
    with pytest.raises(ValueError, match="hash of their tokens is"):
        PromptStream(others, seed=0, shuffle=False).load_state_dict(state)


def test_tokenizers_are_compared_id_by_id(tmp_path, caplog):
    one = train_tokenizer(tmp_path / "a")
    same = train_tokenizer(tmp_path / "b")
    same_tokenizer(one, same)
    assert vocab_size(one) == 259

    spoken = train_tokenizer(tmp_path / "c", ["abab abab"] * 9, vocab_size=262)
    with pytest.raises(ValueError, match=r"3 token ids differ .*259: None vs 'ab'"):
        same_tokenizer(one, spoken)
    with caplog.at_level(logging.WARNING):
        same_tokenizer(one, spoken, allow=True)
    assert "3 token ids differ" in caplog.text

    # as R1-Distill-Qwen does: special tokens that changed places at an equal vocabulary size
    saved = (tmp_path / "a" / "tokenizer.json").read_text()
    swapped = saved.replace("<|im_start|>", "<swap>").replace("<|im_end|>", "<|im_start|>")
    (tmp_path / "a" / "tokenizer.json").write_text(swapped.replace("<swap>", "<|im_end|>"))
    renamed = type(one)(tokenizer_file=str(tmp_path / "a" / "tokenizer.json"))
    assert vocab_size(renamed) == vocab_size(one)
    with pytest.raises(ValueError) as raised:
        same_tokenizer(one, renamed)
    assert "2 token ids differ" in str(raised.value) and "\n" not in str(raised.value)
    assert "1: '<|im_start|>' vs '<|im_end|>'" in str(raised.value)
    assert "teacher.allow_tokenizer_mismatch" in str(raised.value)


@pytest.mark.skipif(not DAPO.exists(), reason="the DAPO prompts are not beside the repository")
def test_dapo_loads_whole_in_seconds(tmp_path):
    texts = [row["prompt"][0]["content"] for row in pq.read_table(DAPO).slice(0, 500).to_pylist()]
    tokenizer = train_tokenizer(tmp_path, texts, vocab_size=1000)
    began = time.perf_counter()
    data = section(str(DAPO), max_prompt_tokens=4096)  # 1000 tokens of vocabulary: long prompts
    prompts = load_prompts(data, tokenizer, require=("answer",))
    seconds = time.perf_counter() - began
    assert len(prompts) == 17917 and seconds < 30
    assert len({p.text for p in prompts}) == 17398  # distinct questions
    assert prompts[0].answer == "34" and prompts[0].source == "math_dapo"
    assert all("\\boxed{{}}.<|im_end|>" in p.text for p in prompts)  # as published
    assert all(tokenizer.decode(list(p.token_ids)) == p.text for p in prompts[::1000])
