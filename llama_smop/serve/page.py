"""The page: a recording, the switches, and what comes of them."""

import logging
import os
import shutil
from html import escape
from pathlib import Path

import gradio as gr

from llama_smop.data.media import MediaError
from llama_smop.serve import html
from llama_smop.serve.about import caution, described
from llama_smop.serve.access import NOT_FETCHED
from llama_smop.serve.pictures import experts_over_time
from llama_smop.serve.players import write_clip, write_crops
from llama_smop.serve.service import Outcome, Refused, Service, Switches
from llama_smop.serve.shelf import Shelf
from llama_smop.transcription import subtitles

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
EVERYTHING = "All it has, and each sense alone"
SENSES = {"Sound + lips": "audiovisual", "Sound alone": "audio", "Lips alone": "video"}
BABBLE = {"none": None, "10 dB": 10.0, "5 dB": 5.0, "0 dB": 0.0, "−5 dB": -5.0}
BLUR = {"none": 0.0, "2 pixels": 2.0, "4 pixels": 4.0, "8 pixels": 8.0}
QUEUE = 16  # visitors that may wait
RESULTS = "/results"  # where the files of results are served
NOTHING_YET = (
    "Choose a file or record something first; a recording that was just stopped takes a moment to get here, and can be "
    "played when it has."
)
FAILED = "Something went wrong here that should not; the server's terminal says what."


def build(service: Service, shelf: Shelf) -> gr.Blocks:
    """The page over a service. Its uploads lie in the shelf's folder for them."""
    os.environ["GRADIO_TEMP_DIR"] = str(shelf.uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    senses = [name for name, modality in SENSES.items() if modality in service.known]
    choices = [EVERYTHING, *senses] if len(senses) > 1 else senses
    with gr.Blocks(title=f"Llama-SMoP · {service.name}", analytics_enabled=False) as page:
        gr.HTML(html.heading(service.name, described(service), caution(service)), elem_id="heading")
        source = gr.State("video")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Video") as seen:
                        video = gr.Video(
                            label="A video, or the webcam",
                            sources=["upload", "webcam"],
                            include_audio=True,
                            webcam_options=gr.WebcamOptions(mirror=False),
                            height=260,
                            elem_id="video",
                        )
                    with gr.Tab("Sound") as heard:
                        sound = gr.Audio(
                            label="A sound file, or the microphone",
                            sources=["upload", "microphone"],
                            type="filepath",
                            editable=False,
                            elem_id="sound",
                        )
                modality = gr.Radio(choices, value=choices[0], label="What the model gets", elem_id="modality")
                babble = gr.Radio(list(BABBLE), value="none", label="Babble over the sound", elem_id="babble")
                blur = gr.Radio(list(BLUR), value="none", label="Blur of the mouth", elem_id="blur")
                go = gr.Button("Transcribe", variant="primary", elem_id="go")
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML(html.notice("The transcript appears here.", "hint"), elem_id="result")
        for component in (video, sound):
            _take_files_only(component)
        seen.select(lambda: "video", None, source, api_visibility="private")
        heard.select(lambda: "sound", None, source, api_visibility="private")

        def run(source, video, sound, modality, babble, blur, request: gr.Request, progress=gr.Progress()):  # noqa: B008
            given = video if source == "video" else sound
            # gradio hands over whatever path a client names, one of this machine's own files too.
            if given is not None and not Path(given).resolve().is_relative_to(shelf.uploads.resolve()):
                return html.notice("This file is not here any more; choose it again.", "refused")
            if given is None:
                return html.notice(NOTHING_YET, "refused")
            folder = shelf.new()
            shelf.give(request.session_hash, Path(given), folder)
            recording = folder / "input"
            try:
                _link(given, recording)
                outcome = service.run(
                    recording,
                    Path(given).name,
                    switches(modality, babble, blur),
                    views=True,
                    progress=lambda what, done, total: progress((done, total or None), desc=what, unit="frames"),
                )
                return show(outcome, service, recording, folder)
            except Refused as refused:
                return html.notice(str(refused), "refused")
            except Exception:
                logger.exception("a job failed")
                return html.notice(FAILED, "refused")
            finally:
                recording.unlink(missing_ok=True)

        def leave(request: gr.Request):
            shelf.leave(request.session_hash)

        inputs = [source, video, sound, modality, babble, blur]
        go.click(run, inputs, result, concurrency_limit=1, api_visibility="private", show_progress_on=[result])
        page.unload(leave)
    page.queue(max_size=QUEUE, default_concurrency_limit=1)
    return page


def look() -> dict:
    """What `gr.mount_gradio_app` needs for the page to look as it should, with fonts of the visitor's own machine."""
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
    script = f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>"
    return {"theme": theme, "css": (HERE / "page.css").read_text(encoding="utf-8"), "head": script}


def switches(modality: str, babble: str, blur: str) -> Switches:
    """The switches as they are set on the page."""
    return Switches(SENSES.get(modality), modality == EVERYTHING, BABBLE[babble], BLUR[blur])


def show(outcome: Outcome, service: Service, recording: Path, folder: Path) -> str:
    """Write the files of a result into its folder, and return the result as HTML."""
    folder.joinpath("transcript.srt").write_text(subtitles.srt(outcome.cues), encoding="utf-8")
    folder.joinpath("transcript.vtt").write_text(subtitles.vtt(outcome.cues), encoding="utf-8")
    folder.joinpath("transcript.json").write_text(outcome.as_json(service.name), encoding="utf-8")
    clip = crop = None
    try:
        clip = write_clip(recording, folder, outcome.has_sound, outcome.has_picture, outcome.parts)
        crop = write_crops(folder, outcome.parts)
    except MediaError as error:  # the text is there all the same
        outcome.transcript.warnings.append(f"the clip cannot be played here: {error.reason}")
    experts = experts_over_time(outcome.experts, outcome.transcript.seconds)
    return html.result(outcome, f"{RESULTS}/{escape(folder.name)}", clip, crop, experts)


def _take_files_only(component: gr.components.Component) -> None:
    """Refuse the address that a client names in place of a file: gradio would have this machine fetch it."""
    keep = component.async_move_resource_to_block_cache

    async def kept(place: str | Path | None) -> str | None:
        if isinstance(place, str) and "://" in place:
            raise gr.Error(NOT_FETCHED, print_exception=False)
        return await keep(place)

    component.async_move_resource_to_block_cache = kept


def _link(given: str, place: Path) -> None:
    """The upload under a name of ours, without copying it where that can be."""
    try:
        os.link(given, place)
    except OSError:
        shutil.copyfile(given, place)
