import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from megatron_opd.config import Data
from megatron_opd.data import encode_response, load_prompts, load_sources
from tests.prompts import wrap, write
from tests.tokenizers import train_tokenizer

DAPO = Path(__file__).parents[2] / "shared" / "data" / "dapo-math-17k-boxed.parquet"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tok"))


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


def test_the_words_around_a_question_are_exchanged(tmp_path, tokenizer):
    words = tmp_path / "words.txt"
    words.write_text("Q: {question}\n")
    rows = [{"prompt": text} for text in (wrap("dapo", "1+1?"), wrap("boxed", "1+1?"), "1+1?")]
    file = write(tmp_path / "a.jsonl", rows)

    def load(template):
        data = section(file, template=template, chat_template="none")
        return load_prompts(data, tokenizer)

    for template, expected in (("boxed", wrap("boxed", "1+1?")), (str(words), "Q: 1+1?")):
        assert {p.text for p in load(template)} == {expected}
    as_it_is = load("none")
    assert [p.text for p in as_it_is] == [row["prompt"] for row in rows]
    for prompts in (as_it_is, load("dapo")):
        assert {p.question for p in prompts} == {"1+1?"}
    line = load_line(section(file, template="boxd"), tokenizer)
    assert line.startswith("data.template: got 'boxd', expected one of none, dapo, boxed, or a")


def test_only_what_the_user_says_is_a_question(tmp_path, tokenizer):
    system = {"role": "system", "content": "be short"}
    talk = [system, {"role": "user", "content": "1+1?"}]
    file = write(tmp_path / "a.jsonl", [{"prompt": talk}, {"prompt": [system]}])
    asked, silent = load_prompts(section(file), tokenizer)
    assert (asked.question, silent.question) == ("1+1?", "")
    line = load_line(section(file, template="boxed"), tokenizer)
    assert f"{file}, row 1: no message by the user, but data.template=boxed" in line
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": talk}))
    data = section(str(tmp_path / "b.jsonl"), template="boxed")
    (prompt,) = load_prompts(data, tokenizer)
    boxed = wrap("boxed", "1+1?")
    assert f"system\nbe short<|im_end|>\n<|im_start|>user\n{boxed}<|im_end|>" in prompt.text


def test_a_jinja_file_is_a_chat_template(tmp_path):
    tokenizer = train_tokenizer(tmp_path, chat=False)
    file = write(tmp_path / "a.jsonl", [{"prompt": "q"}])
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ tone }}{% endfor %}")
    own = {"chat_template": str(jinja)}
    (prompt,) = load_prompts(section(file, **own, chat_template_kwargs={"tone": "!"}), tokenizer)
    assert prompt.text == "[user] q!" == tokenizer.decode(list(prompt.token_ids))
    line = load_line(section(file, **own, chat_template_kwargs={"ton": "!"}), tokenizer)
    assert f"data.chat_template_kwargs.ton: the chat template '{jinja}' has no such" in line
    line = load_line(section(file, chat_template="chatml"), tokenizer)
    expected = "expected tokenizer, none, or a Jinja file"
    assert line == f"data.chat_template: got 'chatml', {expected}"
    jinja.write_text("{% for m in messages %}")
    assert "row 0: the chat template refuses it" in load_line(section(file, **own), tokenizer)


def test_sources_are_the_prompts_of_each_file(tmp_path, tokenizer):
    one = write(tmp_path / "one.jsonl", [{"prompt": "x" * n} for n in (3, 90, 4)])
    two = write(tmp_path / "two.jsonl", [{"prompt": "y", "reward": 1, "response": "z"}])
    data = section(one, two, max_prompt_tokens=60, too_long="drop")
    sources = load_sources(data, tokenizer)
    assert [[p.index for p in source] for source in sources] == [[0, 2], [3]]
    assert [p.reward for source in sources for p in source] == [None, None, 1.0]
    assert load_prompts(data, tokenizer) == [p for source in sources for p in source]
    (held_out,) = load_prompts(data, tokenizer, [two])
    assert (held_out.index, held_out.text) == (0, sources[1][0].text)


def test_ids_may_repeat_in_another_file_only(tmp_path, tokenizer):
    one, two = (
        write(tmp_path / f"{name}.jsonl", [{"prompt": "q", "id": 0}]) for name in ("one", "two")
    )
    assert len(load_prompts(section(one, two), tokenizer)) == 2
    twice = write(tmp_path / "twice.jsonl", [{"prompt": "q", "id": 0}] * 2)
    assert "twice.jsonl, row 1: its id '0'" in load_line(section(one, twice), tokenizer)


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


@pytest.mark.skipif(not DAPO.exists(), reason="the DAPO prompts are not beside the repository")
def test_dapo_loads_whole(tmp_path):
    texts = [row["prompt"][0]["content"] for row in pq.read_table(DAPO).slice(0, 500).to_pylist()]
    tokenizer = train_tokenizer(tmp_path, texts, vocab_size=1000)
    data = section(str(DAPO), max_prompt_tokens=4096)  # 1000 tokens of vocabulary: long prompts
    prompts = load_prompts(data, tokenizer, require=("answer",))
    assert len(prompts) == 17917
    assert len({p.text for p in prompts}) == 17398  # distinct questions
    assert len({p.question for p in prompts}) == 17398
    assert prompts[0].answer == "34" and prompts[0].source == "math_dapo"
    assert all("\\boxed{{}}.<|im_end|>" in p.text for p in prompts)  # as published
    assert all(tokenizer.decode(list(p.token_ids)) == p.text for p in prompts[::1000])
