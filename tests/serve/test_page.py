"""The page without a browser: what it shows is escaped, its addresses give away nothing, commands say what they do."""

import re
from importlib.util import find_spec

import pytest

if find_spec("gradio") is None:  # not imported yet: that takes seconds
    pytest.skip("needs gradio", allow_module_level=True)

from llama_smop.cli import main
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.serve import html, run
from llama_smop.serve.about import caution, described
from llama_smop.serve.access import LOOPBACK, Access
from llama_smop.serve.service import Outcome, Service, Switches
from llama_smop.serve.shelf import Shelf
from llama_smop.transcription.attempts import Transcript
from llama_smop.transcription.pieces import Piece
from tests.serve.conftest import SIZES, site, together

pytestmark = together
EVIL = '<img src=x onerror="alert(1)"> & "quotes" </script>'


@pytest.fixture(scope="module")
def kept():
    made = Shelf()
    yield made
    made.close()


@pytest.fixture(scope="module")
def web(service, kept):
    return site(service, kept, Access(), 200_000, LOOPBACK)


@pytest.fixture(scope="module")
def page():
    from llama_smop.serve import page

    return page


def outcome(**texts) -> Outcome:
    transcripts = {m: Transcript(EVIL, [Piece(0.0, 1.0, text, m, 0)], 1.0, [EVIL]) for m, text in texts.items()}
    return Outcome(EVIL, Switches(), transcripts, True, True)


def test_text_from_outside_is_shown_as_text():
    shown = html.result(outcome(audiovisual=EVIL, audio=EVIL), "/results/key", "clip.mp4", "crop.mp4", "")
    shown += html.notice(EVIL) + html.heading(EVIL, EVIL, EVIL)
    assert "<img" not in shown and "</script" not in shown
    assert "&lt;img src=x onerror=" in shown


def test_words_that_one_sense_alone_got_otherwise_are_marked():
    shown = html.result(outcome(audiovisual="bin blue now", audio="bin red now", video=""), "/r", None, None, "")
    assert "<td>bin <mark>red</mark> now</td>" in shown
    assert "nothing" in shown and "<mark>blue" not in shown


def test_a_result_has_its_files_and_the_page_gives_no_others(web, page, service, files, kept):
    folder = kept.new()
    result = service.run(files["crop.mp4"], "talk.mp4", Switches(compare=True), views=True)
    shown = page.show(result, service, files["crop.mp4"], folder)
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', shown)
    assert len(addresses) == 6 and all(address.startswith(f"/results/{folder.name}/") for address in addresses)
    answers = {address.rsplit("/", 1)[1]: web.get(address) for address in addresses}
    assert {answer.status_code for answer in answers.values()} == {200}
    assert answers["clip.mp4"].content[4:8] == answers["crop.mp4"].content[4:8] == b"ftyp"
    assert web.get(addresses[0], headers={"Range": "bytes=0-9"}).status_code == 206, "browsers seek by ranges"
    assert answers["transcript.json"].json()["texts"].keys() == {"audiovisual", "audio", "video"}
    folder.joinpath("input").write_bytes(b"x")
    for place in (f"{folder.name}/input", f"{folder.name}/..%2f..%2fuploads", "x/clip.mp4"):
        assert web.get(f"/results/{place}").status_code == 404, place


def test_a_sound_file_gets_a_player_of_sound(page, service, files, kept):
    folder = kept.new()
    result = service.run(files["sound.wav"], "a.wav", Switches(snr=0.0), views=True)
    shown = page.show(result, service, files["sound.wav"], folder)
    assert "<audio" in shown and "<video" not in shown
    assert (folder / "clip.wav").read_bytes()[:4] == b"RIFF"


def test_the_browser_is_told_to_ask_nobody_else(web):
    answer = web.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and not re.search(r"https?:|\*", policy)
    config = web.get("/config").json()
    assert not config["analytics_enabled"]
    assert "fonts.googleapis.com" not in str(web.get("/theme.css").text)


def test_files_of_this_machine_are_neither_served_nor_transcribed(web, page, service, files, kept, monkeypatch):
    monkeypatch.setattr(service, "run", lambda *a, **k: pytest.fail("a file that nobody sent was read"))
    assert web.get(f"/gradio_api/file={service.folder}/config.json").status_code in (403, 404)
    (job,) = (function.fn for function in page.build(service, kept).fns.values() if len(function.inputs) == 6)
    for path in (files["crop.mp4"], "/etc/passwd", f"{kept.uploads}/../../etc/passwd", "pyproject.toml"):
        for given in (("video", str(path), None), ("sound", None, str(path))):
            assert "not here any more" in job(*given, page.EVERYTHING, "none", "none", None)


def test_the_page_says_of_a_small_model_what_it_does_not_know(service):
    assert "DEDR, 4 experts, 2 chosen" in described(service)
    assert caution(service) == "This model knows 3 words and no others: bin, blue, now."


def test_the_demos_model_is_said_to_know_its_toy_grammar_alone(tmp_path):
    from llama_smop.data.synthetic.grammar import GRID

    words = [word for _, slot in GRID.slots for word in slot]
    folder = model_folder.save(*build_tiny(words, **SIZES), tmp_path / "run" / "model")
    demo = Service(folder)
    assert demo.name == "run/model"
    assert "toy grammar" in caution(demo) and "bin blue at" in caution(demo)


def one_line(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments)])
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


def test_what_cannot_be_served_is_one_line(capsys, tmp_path, model_path):
    assert "no model here" in one_line(capsys, "--model", tmp_path, "--port", 0)
    assert "--auth takes" in one_line(capsys, "--model", model_path, "--port", 0, "--auth", ":")
    assert "holds no clip" in one_line(capsys, "--model", model_path, "--port", 0, "--babble", tmp_path)
    taken = run._listener("127.0.0.1", 0)
    with taken:
        line = one_line(capsys, "--model", model_path, "--port", taken.getsockname()[1])
    assert "cannot be listened on" in line and "--port" in line


@pytest.mark.parametrize(
    ("options", "warned"),
    [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--auth", "a:b"], False)],
)
def test_a_server_for_others_without_a_password_is_warned_of(model_path, monkeypatch, caplog, capsys, options, warned):
    monkeypatch.setattr("llama_smop.serve.app.build", lambda *arguments: None)
    monkeypatch.setattr(run.uvicorn.Server, "run", lambda self, sockets: None)
    main(["serve", "--model", str(model_path), "--port", "0", *options])
    assert ("--auth" in caplog.text) is warned
    assert "tiny-model: http://" in capsys.readouterr().out


def test_a_share_is_asked_for_only_when_it_is_wanted(model_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda *where: asked.append(where) or "https://relay.example")
    monkeypatch.setattr("llama_smop.serve.app.build", lambda *arguments: None)
    monkeypatch.setattr(run.uvicorn.Server, "run", lambda self, sockets: None)
    main(["serve", "--model", str(model_path), "--port", "0"])
    assert not asked
    main(["serve", "--model", str(model_path), "--port", "0", "--share"])
    assert len(asked) == 1 and "https://relay.example" in capsys.readouterr().out
