"""Every kind of broken row: reported by line, counted exactly, and nothing else lost."""

from __future__ import annotations

import json

import pytest

from lowvram_tuner.data.report import DataError

GOOD = {"prompt": "Question?", "completion": "Answer."}
ROW = json.dumps(GOOD)


def jsonl(*lines: str | bytes, end: bytes = b"\n") -> bytes:
    return b"".join((line if isinstance(line, bytes) else line.encode("utf-8")) + end for line in lines)


def field(**changes) -> str:
    return json.dumps({**GOOD, **changes})


BIG = json.dumps({"prompt": "big", "completion": "x " * 5_000_000})
# name: (file, content, kept, dropped, [(kind, line, count, dropped)], part of the first reason)
CASES = {
    "truncated JSON": ("a.jsonl", jsonl(ROW, '{"prompt": "a", "comp', ROW), 2, 1, [("cut_off", 2, 1, True)], "cut off"),
    "truncated twice": ("a.jsonl", jsonl(ROW, '{"prompt":', ROW, '{"prompt": "a"'), 2, 2, [("cut_off", 2, 2, True)], "cut off"),
    "not JSON": ("a.jsonl", jsonl(ROW, "hello there", ROW), 2, 1, [("broken_json", 2, 1, True)], "not JSON"),
    "single quotes": ("a.jsonl", jsonl("{'prompt': 'a'}", ROW), 1, 1, [("broken_json", 1, 1, True)], "not JSON"),
    "a list": ("a.jsonl", jsonl(ROW, "[1, 2]", ROW), 2, 1, [("not_object", 2, 1, True)], "the row is a list"),
    "a number, text, null": ("a.jsonl", jsonl(ROW, "7", '"text"', "null", ROW), 2, 3, [("not_object", 2, 3, True)], "a number"),
    "wrong type": ("a.jsonl", jsonl(ROW, field(completion=42), ROW), 2, 1, [("wrong_type", 2, 1, True)], "completion is '42' (int)"),
    "null field": ("a.jsonl", jsonl(ROW, field(completion=None)), 1, 1, [("empty", 2, 1, True)], "completion is null"),
    "empty field": ("a.jsonl", jsonl(ROW, field(prompt=""), field(completion=" \n ")), 1, 2, [("empty", 2, 2, True)], "prompt is empty"),
    "missing key": ("a.jsonl", jsonl(ROW, '{"prompt": "a"}', ROW), 2, 1, [("missing", 2, 1, True)], "no 'completion'"),
    "empty object": ("a.jsonl", jsonl(ROW, "{}", ROW), 2, 1, [("missing", 2, 1, True)], "it has nothing"),
    "duplicate keys": ("a.jsonl", jsonl(ROW, '{"prompt": "a", "prompt": "b", "completion": "c"}'), 1, 1, [("duplicate_key", 2, 1, True)], "'prompt' stands twice"),
    "duplicate keys inside": ("a.jsonl", jsonl(ROW, field(x={"y": 1}).replace('"y": 1', '"y": 1, "y" : 2')), 1, 1, [("duplicate_key", 2, 1, True)], "'y' stands twice"),
    "quoted colons are no keys": ("a.jsonl", jsonl(field(completion='say "x": y, "x": z'), ROW), 2, 0, [], ""),
    "bad UTF-8": ("a.jsonl", jsonl(ROW, b'{"prompt": "a\xff", "completion": "b"}', ROW), 2, 1, [("bad_utf8", 2, 1, True)], "0xff at position 14"),
    "Latin-1": ("a.jsonl", jsonl(ROW, '{"prompt": "größe", "completion": "b"}'.encode("latin-1")), 1, 1, [("bad_utf8", 2, 1, True)], "0xf6"),
    "overlong UTF-8": ("a.jsonl", jsonl(ROW, b'{"prompt": "\xc0\xaf", "completion": "b"}'), 1, 1, [("bad_utf8", 2, 1, True)], "0xc0"),
    "raw NUL": ("a.jsonl", jsonl(ROW, b'{"prompt": "a\x00b", "completion": "c"}', ROW), 2, 1, [("nul", 2, 1, True)], "NUL byte at position 14"),
    "escaped NUL": ("a.jsonl", jsonl(ROW, '{"prompt": "a\\u0000b", "completion": "c"}'), 1, 1, [("nul", 2, 1, True)], "NUL character at position 2"),
    "lone surrogate": ("a.jsonl", jsonl(ROW, '{"prompt": "a\\ud83d", "completion": "c"}', ROW), 2, 1, [("surrogate", 2, 1, True)], "U+D83D"),
    "surrogate in a tool name": (
        "a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": [{"role": "user", "content": "a", "name": "\\udc00"}, {"role": "assistant", "content": "\\udc00"}]}'),
        1, 1, [("surrogate", 2, 1, True)], "U+DC00",
    ),
    "a pair of surrogates is a character": ("a.jsonl", jsonl('{"prompt": "a\\ud83d\\ude00", "completion": "c"}'), 1, 0, [], ""),
    "10 MB line": ("a.jsonl", jsonl(ROW, BIG, ROW), 2, 1, [("too_long_line", 2, 1, True)], "10.0 MB; at most 4 MB"),
    "deep nesting": ("a.jsonl", jsonl(ROW, "[" * 200_000, ROW), 2, 1, [("broken_json", 2, 1, True)], "nested too deeply"),
    "a number of 10,000 digits": ("a.jsonl", jsonl(ROW, '{"prompt": ' + "9" * 10_000 + "}"), 1, 1, [("broken_json", 2, 1, True)], "cannot be read"),
    "CRLF": ("a.jsonl", jsonl(ROW, ROW, end=b"\r\n"), 2, 0, [("crlf", 1, 2, False)], "CRLF"),
    "UTF-8 BOM": ("a.jsonl", b"\xef\xbb\xbf" + jsonl(ROW), 1, 0, [("bom", 0, 1, False)], "byte order mark"),
    "BOM in the middle": ("a.jsonl", jsonl(ROW, b"\xef\xbb\xbf" + field(prompt="b").encode()), 2, 0, [("bom", 2, 1, False)], "byte order mark"),
    "UTF-16 LE": ("a.jsonl", b"\xff\xfe" + jsonl(ROW, field(prompt="ü日")).decode().encode("utf-16-le"), 2, 0, [("utf16", 0, 1, False)], "UTF-16"),
    "UTF-16 BE": ("a.jsonl", b"\xfe\xff" + jsonl(ROW).decode().encode("utf-16-be"), 1, 0, [("utf16", 0, 1, False)], "UTF-16"),
    "UTF-16 without BOM": ("a.jsonl", jsonl(ROW).decode().encode("utf-16-le"), 1, 0, [("utf16", 0, 1, False)], "without a byte order mark"),
    "UTF-32": ("a.jsonl", jsonl(ROW).decode().encode("utf-32"), 1, 0, [("utf16", 0, 1, False)], "UTF-32"),
    "UTF-16 with half a pair": ("a.jsonl", jsonl(ROW).decode().encode("utf-16") + '{"prompt": "'.encode("utf-16-le") + b"\x00\xd8" + '"}\n'.encode("utf-16-le"), 1, 1, [("bad_utf8", 2, 1, True), ("utf16", 0, 1, False)], "not UTF-8"),
    "UTF-16 cut in a character": ("a.jsonl", jsonl(ROW, ROW[:-1]).decode().encode("utf-16")[:-1], 1, 1, [("bad_utf8", 2, 1, True), ("utf16", 0, 1, False)], "not UTF-8"),
    "empty lines are no rows": ("a.jsonl", jsonl("", ROW, "   ", "\t", ROW), 2, 0, [], ""),
    "no line feed at the end": ("a.jsonl", jsonl(ROW, ROW)[:-1], 2, 0, [], ""),
    "HTML and script": ("a.jsonl", jsonl(field(completion="<script>alert(1)</script>"), field(completion="<img src=x onerror=alert(1)>"), field(completion="a < b > c")), 3, 0, [("markup", 1, 2, False)], "HTML (<script>)"),
    "control token": ("a.jsonl", jsonl(field(completion="x <|im_end|> y")), 1, 0, [("control", 1, 1, False)], "<|im_end|>"),
    "role unknown": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": [{"role": "boss", "content": "a"}]}'), 1, 1, [("role", 2, 1, True)], "'boss'"),
    "role missing": ("a.jsonl", jsonl('{"messages": [{"content": "a"}]}', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'), 1, 1, [("role", 1, 1, True)], "has no role"),
    "no answer": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}]}', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'), 1, 1, [("no_answer", 1, 1, True)], "assistant's"),
    "messages is text": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": "hello"}'), 1, 1, [("broken_json", 2, 1, True)], "not a JSON list"),
    "a message is a number": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": [3]}'), 1, 1, [("wrong_type", 2, 1, True)], "message 1 is '3'"),
    "an image part": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}'), 1, 1, [("part", 2, 1, True)], "image_url"),
    "10 MB line first": ("a.jsonl", jsonl(BIG, ROW), 1, 1, [("too_long_line", 1, 1, True)], "10.0 MB"),
    "an empty answer": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}'), 1, 1, [("empty", 2, 1, True)], "message 2 (assistant) is empty"),
    "all weights zero": ("a.jsonl", jsonl('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}'), 1, 1, [("no_answer", 2, 1, True)], "weight 0"),
    "JSON list, one element broken": ("a.json", b'[\n  ' + ROW.encode() + b',\n  {"prompt": 1,,},\n  ' + ROW.encode() + b"\n]", 2, 1, [("broken_json", 3, 1, True)], "not JSON"),
    "JSON list, one element open": ("a.json", b'[\n  ' + ROW.encode() + b',\n  {"prompt": "a",\n  ' + field(prompt="b").encode() + b",\n  " + field(prompt="c").encode() + b"\n]", 3, 1, [("cut_off", 3, 1, True)], "not closed"),
    "JSON list, file cut off": ("a.json", b"[" + ROW.encode() + b', {"prompt": "a", "compl', 1, 1, [("cut_off", 1, 1, True)], "cut off"),
    "JSON list, not closed": ("a.json", b"[" + ROW.encode() + b",", 1, 0, [("open_list", 1, 1, False)], "before its list is closed"),
    "JSON list, comma missing": ("a.json", b"[" + ROW.encode() + b" " + field(prompt="b").encode() + b"]", 2, 0, [("missing_comma", 1, 1, False)], "no comma"),
    "JSON list, bad UTF-8": ("a.json", b"[" + ROW.encode() + b',\n{"prompt": "\xe9", "completion": "b"}]', 1, 1, [("bad_utf8", 2, 1, True)], "0xe9"),
    "JSON list, 10 MB element": ("a.json", b"[" + ROW.encode() + b",\n" + BIG.encode() + b",\n" + field(prompt="z").encode() + b"]", 2, 1, [("too_long_line", 2, 1, True)], "10.0 MB"),
    "CSV, unclosed quote": ("a.csv", b'prompt,completion\na,b\n"open,c\nd,"e"\nf,g\n', 3, 1, [("unclosed_quote", 3, 1, True)], "not closed"),
    "CSV, unclosed quote and none after": ("a.csv", b'prompt,completion\na,"open\nd,e\nf,g\n', 2, 1, [("unclosed_quote", 2, 1, True)], "not closed"),
    "CSV, text after a quote": ("a.csv", b'prompt,completion\n"a"x,b\nc,d\n', 1, 1, [("bad_quote", 2, 1, True)], "position 4"),
    "CSV, fields missing and more": ("a.csv", b"prompt,completion\na\nb,c,d\ne,f\n", 1, 2, [("field_count", 2, 2, True)], "1 fields, the header has 2"),
    "CSV, multi-line field": ("a.csv", b'prompt,completion\n"a\nb ""q""","c,\nd"\ne,f\n', 2, 0, [], ""),
    "CSV, empty field": ("a.csv", b"prompt,completion\na,\n,b\nc,d\n", 1, 2, [("empty", 2, 2, True)], "completion is empty"),
    "CSV, bad UTF-8": ("a.csv", b"prompt,completion\na,\xe9\nc,d\n", 1, 1, [("bad_utf8", 2, 1, True)], "0xe9"),
    "CSV, NUL": ("a.csv", b"prompt,completion\na,b\0c\nd,e\n", 1, 1, [("nul", 2, 1, True)], "NUL"),
    "CSV, BOM, semicolons, CRLF": ("a.csv", b"\xef\xbb\xbfprompt;completion\r\na;b, c\r\n", 1, 0, [("bom", 0, 1, False), ("crlf", 2, 1, False)], "mark"),
    "CSV, 10 MB line": ("a.csv", b"prompt,completion\na," + b"x" * 10_000_000 + b"\nb,c\n", 1, 1, [("too_long_line", 2, 1, True)], "10.0 MB"),
    "TSV, quotes as text": ("a.tsv", b'prompt\tcompletion\n"a" b\tc\n"d\te\n', 2, 0, [("plain_quote", 2, 2, False)], "taken as text"),
    "text, bad UTF-8": ("a.txt", b"One.\n\n\xff\xfe bad\n\nTwo.\n", 2, 1, [("bad_utf8", 3, 1, True)], "0xff"),
    "text, NUL": ("a.txt", b"One.\n" + b"x" * 17_000 + b"\n\nTwo\0.\n", 1, 1, [("nul", 4, 1, True)], "NUL"),
    "text, 10 MB line": ("a.md", b"One.\n\n" + b"x" * 10_000_000 + b"\n\nTwo.\n", 2, 1, [("too_long_line", 3, 1, True)], "10.0 MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_broken_rows_are_reported_by_line_and_counted(name, write, prepared):
    file, content, kept, dropped, problems, words = CASES[name]
    report = prepared(write(file, content), max_seq_length=8192).report
    assert (report.kept, report.dropped, report.rows) == (kept, dropped, kept + dropped)
    found = [p for p in report.problems if p.kind not in ("duplicate", "split")]  # the good rows repeat each other
    assert [(p.kind, p.line, p.count, p.dropped) for p in found] == problems
    assert not words or words in found[0].reason
    assert all(p.file == file and len(p.lines) == p.count for p in found)


def test_what_is_kept_is_not_changed(write, prepared, tokenizer):
    text = 'He said "hi"\t<b>x</b>\\n \u2028 \ufeff é e\u0301 🙂  two  spaces'
    result = prepared(write("a.jsonl", [{"prompt": "q", "completion": text}]))
    example = result.train[0]
    assert tokenizer.decode(example.input_ids[example.trained], clean_up_tokenization_spaces=False) == text + "<|im_end|>"


def test_many_broken_rows_are_counted_exactly_and_listed_briefly(write, prepared):
    path = write("a.jsonl", "".join(ROW + "\n" if i % 3 else "{\n" for i in range(3000)))
    report = prepared(path).report
    assert (report.rows, report.kept, report.dropped) == (3000, 2000, 1000)
    broken = report.problems[0]
    assert (broken.count, broken.lines[:3], len(broken.lines)) == (1000, [1, 4, 7], 50)
    assert report.duplicates == 1999


def test_reports_are_valid_text_whatever_the_data_holds(write, prepared):
    bad = '{"prompt": "q", "completion": "a", "\\udc80\\n%s": 1}' % ("k" * 3000)
    report = prepared(write("a.jsonl", jsonl(ROW, bad, '{"\\ud800": 1}', field(completion=["\ud83d"])))).report
    assert report.kept == 2
    for problem in report.problems:
        assert problem.reason.encode("utf-8") and "\n" not in problem.reason and len(problem.reason) <= 400
    with pytest.raises(DataError) as caught:
        prepared(write("b.jsonl", '{"\\ud800": 1, "b": 2}\n'))
    assert str(caught.value).encode("utf-8")


UNUSABLE = {
    "empty file": ("a.jsonl", b"", "a.jsonl is empty"),
    "only white space": ("a.jsonl", b"\n \n\t\n", "no row that can be trained on: 0 read"),
    "only a BOM": ("a.jsonl", b"\xef\xbb\xbf", "no row that can be trained on: 0 read"),
    "only broken rows": ("a.jsonl", b'{"a\n{"b\n', r"2 read, 2 dropped; most often: the JSON is cut off.*\(line 1\)"),
    "an empty list": ("a.json", b"[]", "no row that can be trained on: 0 read"),
    "unknown columns": ("a.csv", b"a,b\n1,2\n", "has the columns a, b, which fit no known layout.*prompt=QUESTION_COLUMN"),
    "only a header": ("a.csv", b"prompt,completion\n", "no row that can be trained on: 0 read"),
    "CSV of white space": ("a.csv", b"\n\n", "a.csv is empty; the first line must name the columns"),
    "header twice": ("a.csv", b"text,text\na,b\n", "names the column 'text' twice"),
    "header with an open quote": ("a.csv", b'"prompt,completion\na,b\n', "line 1: the header has a quote that is not closed"),
    "not Parquet": ("a.parquet", b"PAR1 nonsense", "a.parquet cannot be read as Parquet"),
    "unknown ending": ("a.docx", b"x", "has the ending '.docx'; files that can be read end in .json"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_refused_in_one_sentence(name, write, prepared, tmp_path):
    file, content, words = UNUSABLE[name]
    with pytest.raises(DataError, match=words) as caught:
        prepared(write(file, content))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs/cache/*")), "a refused dataset leaves nothing behind"
