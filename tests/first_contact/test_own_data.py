"""One study of one's own file from the first command to the export, and what happens when the file changes."""

import json

import transformers

from lorasweep.cli import main

SMALL = ["train.max_steps=2", "train.batch_size=4", "tracking=none", "lora.r=2"]


def test_file_that_changed_ends_a_resume_with_both_fingerprints_unless_it_is_accepted(tiny_bert, tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text("review,stars\n" + "".join(f"a text {i},{i % 2}.0\n" for i in range(60)) + "no stars,\n")
    place = [f"outputs={tmp_path / 'out'}", "study=s"]
    assert main.main([f"data.path={path}", f"model.pretrained={tiny_bert}", *SMALL, *place]) == 0
    folder = tmp_path / "out" / "s"
    run = json.loads((folder / "0" / "run.json").read_text())
    assert run["data"]["rows"] == {"train": 48, "eval": 6, "test": 6} and run["data"]["left_out"] == {"train": 1}
    assert any("mine.csv:62: has no label" in note for note in run["data"]["notes"])
    report = (folder / "report.html").read_text(encoding="utf8")
    assert "rows left out" in report and "has no label" in report and "data.max_tokens=128 by the data" in report
    assert main.main(["resume", str(folder)]) == 0
    path.write_text(path.read_text().replace("a text 7,", "another text 7,"))
    capsys.readouterr()
    assert main.main(["resume", str(folder)]) == 1
    said = capsys.readouterr()
    before = run["data"]["fingerprint"][:12]
    assert f"mine.csv has changed: fingerprint {before}, now " in said.out + said.err
    assert "--changed-data" in said.out + said.err
    assert main.main(["work", str(folder)]) == 1
    assert main.main(["resume", str(folder), "--changed-data"]) == 0
    assert main.main(["resume", str(folder)]) == 0, "what was accepted is known"
    assert main.main(["predict", str(folder), "a text"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split("\t")[0] in ("0", "1")


def test_chats_for_a_model_without_a_template_are_exported_with_the_one_given(tiny_llama, tmp_path):
    path = tmp_path / "chats.json"
    turns = [[{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": f"good {i}"}] for i in range(60)]
    path.write_text(json.dumps([{"conversations": t} for t in turns]))
    words = ["task_type=causal_lm", f"data.path={path}", f"model.pretrained={tiny_llama}", *SMALL]
    place = [f"outputs={tmp_path / 'out'}", "study=s"]
    assert main.main([*words, *place]) == 1
    assert not (tmp_path / "out").exists()
    assert main.main([*words, "data.chat_template=chatml", *place]) == 0
    assert main.main(["export", str(tmp_path / "out" / "s"), "--to", str(tmp_path / "export")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nhi[SEP]\n<|im_start|>assistant\n"
