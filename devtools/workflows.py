"""The example workflows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from graphs import WIDTH, Graph, Node, Out

DIT, VAE, TEXT = "wan2.1_t2v_1.3B_bf16.safetensors", "wan_2.1_vae.safetensors", "umt5_xxl_fp16.safetensors"
I2V, FLF2V = "wan2.1_i2v_480p_14B_fp16.safetensors", "wan2.1_flf2v_720p_14B_fp16.safetensors"
HIGH, LOW = "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"
VISION = "clip_vision_h.safetensors"


def _files(*dits: str, vision: bool = False) -> str:
    lines = [
        *(f"- `models/diffusion_models/{dit}`" for dit in dits),
        f"- `models/vae/{VAE}`",
        f"- `models/text_encoders/{TEXT}`",
    ]
    return "\n".join(["**Model files**", *lines, *([f"- `models/clip_vision/{VISION}`"] if vision else [])])


FILES = f"""{_files(DIT)}

Any other Wan 2.1 or 2.2 text-to-video file works as well: choose it in the loaders."""
PROMPT = "character_1, walking through a park"
NEGATIVE = "blurry, static, overexposed, worst quality"


@dataclass(frozen=True, kw_only=True)
class Shot:
    """What is sampled, and how: as suits a family."""

    width: int = 832
    height: int = 480
    frames: int = 81
    fps: float = 16.0
    steps: int = 30
    solver: str = "unipc"
    negative: str = NEGATIVE

    @property
    def size(self) -> dict[str, int]:
        return {"width": self.width, "height": self.height, "frames": self.frames}


WAN_SHOT = Shot()


def _sampling(graph: Graph, column: int, dit: Node, model: Out, text: Node, vae: Node, prompt: str, prefix: str,
              skip_cfg: bool = False, shot: Shot = WAN_SHOT, **images: Any) -> None:  # fmt: skip
    """From prompts to a saved video; `images` are inputs of the node that encodes a start image, if there is one."""
    positive = graph.add(column, "VideoLoRAEncodeText", "Prompt", text_encoder=text[0], prompt=prompt)
    negative = graph.add(column, "VideoLoRAEncodeText", "Negative prompt", text_encoder=text[0], prompt=shot.negative)
    told, away = positive[0], negative[0]
    if images:
        encoded = graph.add(column + 1, "VideoLoRAEncodeImage", dit=dit[0], positive=told, negative=away, vae=vae[0],
                            **shot.size, **images)  # fmt: skip
        told, away, latent = encoded[0], encoded[1], encoded[2]
    else:
        latent = graph.add(column, "VideoLoRAEmptyLatent", dit=dit[0], **shot.size, batch_size=1)[0]
    schedule = graph.add(
        column, "VideoLoRAFlowSchedule", dit=dit[0], steps=shot.steps, shift=0.0, solver=shot.solver, latent=latent
    )
    if skip_cfg:
        schedule = graph.add(column, "VideoLoRACFGSkip", schedule=schedule[0], ratio=0.5, mode="late")
    sampled = graph.add(column + 1, "VideoLoRASample", dit=model, positive=told, negative=away, latent=latent,
                        schedule=schedule[0], guidance=0.0, seed=0)  # fmt: skip
    _saved(graph, column + 1, vae, sampled[0], prefix, shot.fps)


def wan_t2v_train_loraid() -> Graph:
    graph = Graph(f"""# Train one LORAID of Wan text-to-video, then look at it
Put clips and a `.txt` caption for each into `ComfyUI/input/character_1`. Choose a LORAID that no other LoRA of yours has.
The LoRA is written to `ComfyUI/output/loras`.

{FILES}""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    data = graph.add(0, "VideoLoRADatasetFolder", caption_extension=".txt", width=832, height=480, frames="81", repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder="character_1")  # fmt: skip
    latents = graph.add(1, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0])
    captions = graph.add(1, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    loraid = graph.add(1, "VideoLoRASelectLORAID", dit=dit[0], loraid=1, units_per_id=12, unit="slot")
    network = graph.add(1, "VideoLoRANetworkSettings", rank=16, alpha=16.0)
    optimizer = graph.add(1, "VideoLoRAOptimizerSettings", learning_rate=2e-4, weight_decay=0.01, warmup_steps=0,
                          gradient_accumulation=1, max_grad_norm=1.0)  # fmt: skip
    save = graph.add(1, "VideoLoRASaveSettings", every_steps=500, every_epochs=0, keep=0, precision="bfloat16")
    train = graph.add(2, "VideoLoRATrain", dit=dit[0], latents=latents[0], text=captions[0], name="character_1", steps=1000,
                      seed=42, loraid=loraid[0], network=network[0], optimizer=optimizer[0], save=save[0])  # fmt: skip
    applied = graph.add(2, "VideoLoRAApplyLoRA", dit=dit[0], loras=train[0], allow_overlap=False)
    _sampling(graph, 3, dit, applied[0], text, vae, PROMPT, "video/character_1")
    return graph


def wan_t2v_prepare_data() -> Graph:
    graph = Graph(f"""# Look at the data, then cache it
Put clips or images and a `.txt` caption for each into `ComfyUI/input/character_1`. The preview shows what training will
see: crops, frame windows, captions, what is left out and why. It needs no weights. Then clips go through the VAE and
captions through the text encoder; what is cached is never done again, and cancelling loses nothing. To look first, mute
(Ctrl+M) the nodes to the right of the preview.

{FILES}""")
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    data = graph.add(0, "VideoLoRADatasetFolder", caption_extension=".txt", width=832, height=480, frames="81", repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder="character_1")  # fmt: skip
    preview = graph.add(
        1, "VideoLoRADatasetPreview", size=(760, 700), datasets=data[0], vae=vae[0], text_encoder=text[0], shown=4
    )
    graph.add(2, "SaveVideo", video=preview[1], filename_prefix="video/preview", format="auto", codec="auto")
    latents = graph.add(3, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0])
    captions = graph.add(3, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    graph.add(4, "PreviewAny", "Latents", size=(WIDTH, 180), source=latents[1])
    graph.add(4, "PreviewAny", "Captions", size=(WIDTH, 180), source=captions[1])
    return graph


def _two_loras(graph: Graph) -> tuple[Node, Node]:
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    first = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=1, lora="character_1.safetensors")
    second = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=2, lora="character_2.safetensors", loras=first[0])
    return dit, graph.add(1, "VideoLoRAApplyLoRA", dit=dit[0], loras=second[0], allow_overlap=False)


def wan_t2v_two_loraids() -> Graph:
    graph = Graph(f"""# Two LORAIDs in one video
Both LoRAs are applied together. Each has its own multiplier; 0 switches it off. Files that touch the same parameters are
refused. CFG Skip leaves guidance out of some steps to save time.

{FILES}
- `output/loras/character_1.safetensors` (LORAID 1) and `character_2.safetensors` (LORAID 2)""")
    dit, applied = _two_loras(graph)
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    _sampling(graph, 2, dit, applied[0], text, vae, "character_1 and character_2, walking through a park", "video/two_loraids",
              skip_cfg=True)  # fmt: skip
    return graph


def wan_t2v_merge() -> Graph:
    graph = Graph(f"""# Merge two LORAIDs into a checkpoint
The new checkpoint is written to `ComfyUI/output/diffusion_models`; it needs as much disk space as the model, and hardly any
memory. The order of the LoRAs does not matter.

{FILES}""")
    _, applied = _two_loras(graph)
    graph.add(2, "VideoLoRAMergeLoRA", dit=applied[0], name="wan2.1_t2v_character_1_2")
    return graph


def _training(graph: Graph, model: Node, name: str, frames: str, folder: str, **latents: Any) -> Node:
    """From a folder to a LoRA; `latents` are further inputs of the node that caches them."""
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    data = graph.add(1, "VideoLoRADatasetFolder", caption_extension=".txt", width=832, height=480, frames=frames, repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder=folder)  # fmt: skip
    cached = graph.add(2, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0], **latents)
    captions = graph.add(2, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    network = graph.add(1, "VideoLoRANetworkSettings", rank=16, alpha=16.0)
    optimizer = graph.add(1, "VideoLoRAOptimizerSettings", learning_rate=2e-4, weight_decay=0.01, warmup_steps=0,
                          gradient_accumulation=1, max_grad_norm=1.0)  # fmt: skip
    return graph.add(3, "VideoLoRATrain", dit=model[0], latents=cached[0], text=captions[0], name=name, steps=1000, seed=42,
                     network=network[0], optimizer=optimizer[0])  # fmt: skip


def wan_i2v_train() -> Graph:
    graph = Graph(f"""# Train Wan image-to-video
Put clips and a `.txt` caption for each into `ComfyUI/input/character_1`. The model is linked to Cache Latents too: what it is
told of each clip's first frame is cached with the latents. Wan 2.2 image-to-video takes no CLIP: leave that loader out.

{_files(I2V, vision=True)}""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=I2V, variant="auto")
    vision = graph.add(0, "VideoLoRALoadCLIPVision", model=VISION)
    _training(graph, dit, "character_1_i2v", "81", "character_1", dit=dit[0], clip_vision=vision[0])
    return graph


def wan_t2i_train() -> Graph:
    graph = Graph(f"""# Train Wan on pictures
Put pictures and a `.txt` caption for each into `ComfyUI/input/pictures_1`. A picture is a video of one frame: the LoRA works
for pictures and for videos. For a picture choose 1 frame in Empty Video Latent.

{FILES}""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    _training(graph, dit, "pictures_1", "1", "pictures_1")
    return graph


def wan22_train_experts() -> Graph:
    graph = Graph(f"""# Train both experts of Wan 2.2
The experts for high and low noise are trained in one run, in turns of many steps, each with the noise levels it is used for.
Two LoRAs are written to `ComfyUI/output/loras`, `character_1_high` and `character_1_low`. To train one expert alone, load it
with Load Video DiT and choose its variant.

{_files(HIGH, LOW)}""")
    dit = graph.add(0, "VideoLoRALoadWanExperts", high=HIGH, low=LOW)
    _training(graph, dit, "character_1", "81", "character_1")
    return graph


def wan22_t2v_sample() -> Graph:
    graph = Graph(f"""# A video with Wan 2.2
Two models, one for high noise and one for low noise, are used as one. Each is loaded when it is needed. LoRAs that were
trained for one of them go to that one; others go to both.

{_files(HIGH, LOW)}
- `output/loras/character_1_high.safetensors` and `character_1_low.safetensors`""")
    dit = graph.add(0, "VideoLoRALoadWanExperts", high=HIGH, low=LOW)
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    high = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=0, lora="character_1_high.safetensors")
    low = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=0, lora="character_1_low.safetensors", loras=high[0])
    applied = graph.add(1, "VideoLoRAApplyLoRA", dit=dit[0], loras=low[0], allow_overlap=False)
    _sampling(graph, 2, dit, applied[0], text, vae, PROMPT, "video/wan22")
    return graph


def _from_images(title: str, dit: str, prefix: str, *images: str) -> Graph:
    graph = Graph(f"""# {title}
Choose your own images. They are resized to cover the video and cropped to its middle.

{_files(dit, vision=True)}""")
    model = graph.add(0, "VideoLoRALoadDiT", model=dit, variant="auto")
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    vision = graph.add(0, "VideoLoRALoadCLIPVision", model=VISION)
    inputs = {name: graph.add(1, "LoadImage", name.replace("_", " ").capitalize(), (WIDTH, 330), image=f"{name}.png")[0]
              for name in images}  # fmt: skip
    _sampling(graph, 2, model, model[0], text, vae, PROMPT, prefix, **inputs, clip_vision=vision[0])
    return graph


def wan_i2v_sample() -> Graph:
    return _from_images("A video that begins with an image", I2V, "video/i2v", "start_image")


def wan_flf2v_sample() -> Graph:
    return _from_images("A video from a first to a last image", FLF2V, "video/flf2v", "start_image", "end_image")


def _opened(graph: Graph) -> tuple[Node, Node, Node]:
    """Model, VAE and text encoder of text-to-video."""
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    return dit, graph.add(0, "VideoLoRALoadVAE", model=VAE), graph.add(0, "VideoLoRALoadT5", model=TEXT)


def _prompts(graph: Graph, column: int, text: Node) -> dict[str, Out]:
    return {
        "positive": graph.add(column, "VideoLoRAEncodeText", "Prompt", text_encoder=text[0], prompt=PROMPT)[0],
        "negative": graph.add(column, "VideoLoRAEncodeText", "Negative prompt", text_encoder=text[0], prompt=NEGATIVE)[
            0
        ],
    }


def _saved(graph: Graph, column: int, vae: Node, latent: Out, prefix: str, fps: float = 16.0) -> None:
    frames = graph.add(column, "VideoLoRADecode", vae=vae[0], latent=latent)
    video = graph.add(column, "CreateVideo", images=frames[0], fps=fps)
    graph.add(column, "SaveVideo", video=video[0], filename_prefix=prefix, format="auto", codec="auto")


def wan_t2v_sample() -> Graph:
    graph = Graph(f"""# A video from a prompt
*Sampling Memory and Speed* holds the model in fp8 to fit a smaller card; with block_swap above 0 a part of it stays in main
memory. The latents are kept with their prompt, seed and settings: `wan_decode_latents` decodes them again.

{FILES}""")
    dit, vae, text = _opened(graph)
    held = graph.add(1, "VideoLoRASamplingMemory", dit=dit[0], precision="fp8_scaled", block_swap=0, attention="sdpa",
                     compile=False)  # fmt: skip
    schedule = graph.add(1, "VideoLoRAFlowSchedule", dit=dit[0], steps=30, shift=0.0, solver="unipc")
    latent = graph.add(1, "VideoLoRAEmptyLatent", dit=dit[0], width=832, height=480, frames=81, batch_size=1)
    sampled = graph.add(2, "VideoLoRASample", dit=held[0], **_prompts(graph, 1, text), latent=latent[0],
                        schedule=schedule[0], guidance=0.0, seed=0)  # fmt: skip
    kept = graph.add(2, "VideoLoRASaveLatents", latent=sampled[0], name="video")
    _saved(graph, 2, vae, kept[0], "video/t2v")
    return graph


def wan_decode_latents() -> Graph:
    graph = Graph(f"""# Decode saved latents
Choose a file that *Save Video Latents* wrote. What it was sampled with is shown under the loader. *Tiles* need less memory.

**Model files**
- `models/vae/{VAE}`""")
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    latent = graph.add(0, "VideoLoRALoadLatents", size=(WIDTH, 300), file="video_00001.latent")
    _saved(graph, 1, vae, latent[0], "video/decoded")
    return graph


def wan_t2i_sample() -> Graph:
    graph = Graph(f"""# A picture with a video model
A picture is a video of one frame.

{FILES}""")
    dit, vae, text = _opened(graph)
    schedule = graph.add(1, "VideoLoRAFlowSchedule", dit=dit[0], steps=30, shift=0.0, solver="unipc")
    latent = graph.add(1, "VideoLoRAEmptyLatent", dit=dit[0], width=1024, height=1024, frames=1, batch_size=1)
    sampled = graph.add(2, "VideoLoRASample", dit=dit[0], **_prompts(graph, 1, text), latent=latent[0],
                        schedule=schedule[0], guidance=0.0, seed=0)  # fmt: skip
    frames = graph.add(2, "VideoLoRADecode", vae=vae[0], latent=sampled[0])
    graph.add(2, "SaveImage", images=frames[0], filename_prefix="t2i")
    return graph


def wan_v2v_sample() -> Graph:
    graph = Graph(f"""# A video from a video
The strength says how much is made anew: 1 everything, 0 nothing; 0.5 to 0.8 keep the composition and the motion.

{FILES}""")
    dit, vae, text = _opened(graph)
    video = graph.add(1, "VideoLoRALoadFrames", dit=dit[0], source="video.mp4", width=832, height=480, frames=81)
    latent = graph.add(1, "VideoLoRAEncodeVideo", vae=vae[0], frames=video[0])
    schedule = graph.add(2, "VideoLoRAFlowSchedule", dit=dit[0], steps=30, shift=0.0, solver="unipc")
    sampled = graph.add(3, "VideoLoRASample", dit=dit[0], **_prompts(graph, 2, text), latent=latent[0],
                        schedule=schedule[0], guidance=0.0, seed=0, strength=0.7)  # fmt: skip
    _saved(graph, 3, vae, sampled[0], "video/v2v")
    return graph


def wan_cfg_skip() -> Graph:
    graph = Graph(f"""# What leaving out guidance costs and saves
The same video three times: guidance in all steps, in the first half only, and in the middle half only. A step without
guidance takes half the time.

{FILES}""")
    dit, vae, text = _opened(graph)
    prompts = _prompts(graph, 1, text)
    schedule = graph.add(1, "VideoLoRAFlowSchedule", dit=dit[0], steps=30, shift=0.0, solver="unipc")
    latent = graph.add(1, "VideoLoRAEmptyLatent", dit=dit[0], width=832, height=480, frames=81, batch_size=1)
    for column, mode in enumerate(("none", "late", "early_late"), start=2):
        planned = graph.add(column, "VideoLoRACFGSkip", mode, schedule=schedule[0], ratio=0.5, mode=mode)
        sampled = graph.add(column, "VideoLoRASample", dit=dit[0], **prompts, latent=latent[0], schedule=planned[0],
                            guidance=0.0, seed=0)  # fmt: skip
        _saved(graph, column, vae, sampled[0], f"video/cfg_{mode}")
    return graph


def wan_t2v_lora_workbench() -> Graph:
    graph = Graph(f"""# Look at LoRAs, convert and resize one, take one out of a checkpoint
The map shows which modules each LoRA changes and where they overlap; the report also names the LORAIDs that are free.
New LoRAs are written to `ComfyUI/output/loras`. Unmerging brings back the bytes of the base.

{FILES}
- `output/loras/character_1.safetensors` (LORAID 1) and `character_2.safetensors` (LORAID 2)
- `output/diffusion_models/wan2.1_t2v_character_1_2.safetensors`""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    merged = graph.add(0, "VideoLoRALoadDiT", "Merged", model="wan2.1_t2v_character_1_2.safetensors", variant="auto")
    first = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=1, lora="character_1.safetensors")
    second = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=2, lora="character_2.safetensors", loras=first[0])
    graph.add(2, "VideoLoRAInspectLoRA", size=(760, 560), dit=dit[0], loras=second[0])
    graph.add(
        3,
        "VideoLoRAConvertLoRA",
        dit=dit[0],
        lora="character_1.safetensors",
        dialect="diffusers",
        name="character_1_diffusers",
    )
    graph.add(3, "VideoLoRAResizeLoRA", dit=dit[0], lora="character_1.safetensors", rank=8, name="character_1_rank_8")
    graph.add(
        3, "VideoLoRAUnmergeLoRA", dit=merged[0], loras=first[0], name="wan2.1_t2v_character_2_alone", base=dit[0]
    )
    return graph


HUNYUAN, HUNYUAN_VAE = "hunyuan_video_t2v_720p_bf16.safetensors", "hunyuan_video_vae_bf16.safetensors"
SKYREELS, SKYREELS_I2V = "skyreels_hunyuan_t2v_bf16.safetensors", "skyreels_hunyuan_i2v_bf16.safetensors"
LLAMA, CLIP_L = "llava_llama3_fp16.safetensors", "clip_l.safetensors"
HUNYUAN_SHOT = Shot(width=960, height=544, frames=97, fps=24.0, steps=50, solver="euler")
# What the authors of SkyReels recommend, as its releases have it too.
SKYREELS_SHOT = Shot(width=960, height=544, frames=97, fps=24.0, steps=30, solver="euler",
                     negative="Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad "
                     "teeth, bad eyes, bad limbs, distortion")  # fmt: skip


def _hunyuan_files(dit: str) -> str:
    return f"""**Model files**
- `models/diffusion_models/{dit}`
- `models/vae/{HUNYUAN_VAE}`
- `models/text_encoders/{LLAMA}` and `{CLIP_L}`"""


def _hunyuan(graph: Graph, dit: str = HUNYUAN) -> tuple[Node, Node, Node]:
    """Model, VAE and text encoder."""
    model = graph.add(0, "VideoLoRALoadDiT", model=dit, variant="auto")
    vae = graph.add(0, "VideoLoRALoadVAE", model=HUNYUAN_VAE)
    llm = graph.add(0, "VideoLoRALoadLLM", model=LLAMA)
    return model, vae, graph.add(0, "VideoLoRALoadCLIP", llm=llm[0], model=CLIP_L)


def hunyuan_t2v_train_loraid() -> Graph:
    graph = Graph(f"""# Train one LORAID of HunyuanVideo, then look at it
Put clips and a `.txt` caption for each into `ComfyUI/input/character_1`. Choose a LORAID that no other LoRA of yours has.
The LoRA is written to `ComfyUI/output/loras`, in the form of which ComfyUI's own loader finds every key.

{_hunyuan_files(HUNYUAN)}""")
    dit, vae, text = _hunyuan(graph)
    data = graph.add(1, "VideoLoRADatasetFolder", caption_extension=".txt", width=960, height=544, frames="49", repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder="character_1")  # fmt: skip
    latents = graph.add(1, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0])
    captions = graph.add(1, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    loraid = graph.add(1, "VideoLoRASelectLORAID", dit=dit[0], loraid=1, units_per_id=12, unit="slot")
    network = graph.add(2, "VideoLoRANetworkSettings", rank=16, alpha=16.0)
    optimizer = graph.add(2, "VideoLoRAOptimizerSettings", learning_rate=2e-4, weight_decay=0.01, warmup_steps=0,
                          gradient_accumulation=1, max_grad_norm=1.0)  # fmt: skip
    train = graph.add(2, "VideoLoRATrain", dit=dit[0], latents=latents[0], text=captions[0], name="hunyuan_character_1",
                      steps=1000, seed=42, loraid=loraid[0], network=network[0], optimizer=optimizer[0])  # fmt: skip
    applied = graph.add(2, "VideoLoRAApplyLoRA", dit=dit[0], loras=train[0], allow_overlap=False)
    _sampling(graph, 3, dit, applied[0], text, vae, PROMPT, "video/hunyuan_character_1", shot=HUNYUAN_SHOT)
    return graph


def hunyuan_t2v_sample() -> Graph:
    graph = Graph(f"""# A video with HunyuanVideo
The model is told its guidance (embedded guidance, 6), which costs no time; guidance itself is 1, so the negative prompt is
not used unless it is raised. The flow shift is 7, and 17 below 20 steps.

{_hunyuan_files(HUNYUAN)}""")
    dit, vae, text = _hunyuan(graph)
    held = graph.add(1, "VideoLoRASamplingMemory", dit=dit[0], precision="fp8_scaled", block_swap=0, attention="sdpa",
                     compile=False)  # fmt: skip
    _sampling(graph, 1, dit, held[0], text, vae, PROMPT, "video/hunyuan_t2v", shot=HUNYUAN_SHOT)
    return graph


def hunyuan_v2v_sample() -> Graph:
    graph = Graph(f"""# A video from a video with HunyuanVideo
The strength says how much is made anew: 1 everything, 0 nothing; 0.5 to 0.8 keep the composition and the motion.

{_hunyuan_files(HUNYUAN)}""")
    dit, vae, text = _hunyuan(graph)
    shot = HUNYUAN_SHOT
    video = graph.add(
        1,
        "VideoLoRALoadFrames",
        dit=dit[0],
        source="video.mp4",
        width=shot.width,
        height=shot.height,
        frames=shot.frames,
    )
    latent = graph.add(1, "VideoLoRAEncodeVideo", vae=vae[0], frames=video[0])
    prompt = graph.add(1, "VideoLoRAEncodeText", "Prompt", text_encoder=text[0], prompt=PROMPT)
    schedule = graph.add(2, "VideoLoRAFlowSchedule", dit=dit[0], steps=shot.steps, shift=0.0, solver="euler")
    sampled = graph.add(2, "VideoLoRASample", dit=dit[0], positive=prompt[0], latent=latent[0], schedule=schedule[0], guidance=0.0,
                        seed=0, strength=0.7)  # fmt: skip
    _saved(graph, 3, vae, sampled[0], "video/hunyuan_v2v", shot.fps)
    return graph


def skyreels_t2v_sample() -> Graph:
    graph = Graph(f"""# A video with SkyReels V1
Its file has the same tensors as HunyuanVideo's, so its variant is chosen in the loader. With it come what its authors recommend:
guidance 6 with the negative prompt, embedded guidance 1.

{_hunyuan_files(SKYREELS)}""")
    dit, vae, text = _hunyuan(graph, SKYREELS)
    _sampling(graph, 1, dit, dit[0], text, vae, "FPS-24, " + PROMPT, "video/skyreels_t2v", shot=SKYREELS_SHOT)
    return graph


def skyreels_i2v_sample() -> Graph:
    graph = Graph(f"""# A video with SkyReels V1 that begins with an image
Choose your own image. It is resized to cover the video and cropped to its middle. What the authors of SkyReels recommend comes
with its checkpoint: guidance 6 with the negative prompt, embedded guidance 1.

{_hunyuan_files(SKYREELS_I2V)}""")
    dit, vae, text = _hunyuan(graph, SKYREELS_I2V)
    image = graph.add(1, "LoadImage", "Start image", (WIDTH, 330), image="start_image.png")
    _sampling(
        graph,
        2,
        dit,
        dit[0],
        text,
        vae,
        "FPS-24, " + PROMPT,
        "video/skyreels_i2v",
        shot=SKYREELS_SHOT,
        start_image=image[0],
    )
    return graph


def _two_hunyuan_loras(graph: Graph, dit: Node) -> Node:
    first = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=1, lora="hunyuan_character_1.safetensors")
    second = graph.add(
        1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=2, lora="hunyuan_character_2.safetensors", loras=first[0]
    )
    return graph.add(1, "VideoLoRAApplyLoRA", dit=dit[0], loras=second[0], allow_overlap=False)


_TWO_HUNYUAN = (
    "- `output/loras/hunyuan_character_1.safetensors` (LORAID 1) and `hunyuan_character_2.safetensors` (LORAID 2)"
)


def hunyuan_t2v_two_loraids() -> Graph:
    graph = Graph(f"""# Two LORAIDs of HunyuanVideo in one video
Both LoRAs are applied together. Files that touch the same parameters are refused.

{_hunyuan_files(HUNYUAN)}
{_TWO_HUNYUAN}""")
    dit, vae, text = _hunyuan(graph)
    applied = _two_hunyuan_loras(graph, dit)
    _sampling(graph, 2, dit, applied[0], text, vae, "character_1 and character_2, walking through a park", "video/hunyuan_two_loraids",
              shot=HUNYUAN_SHOT)  # fmt: skip
    return graph


def hunyuan_t2v_merge() -> Graph:
    graph = Graph(f"""# Merge two LORAIDs into a HunyuanVideo checkpoint
The new checkpoint is written to `ComfyUI/output/diffusion_models`; it needs as much disk space as the model, and hardly any
memory. The order of the LoRAs does not matter.

**Model files**
- `models/diffusion_models/{HUNYUAN}`
{_TWO_HUNYUAN}""")
    applied = _two_hunyuan_loras(graph, graph.add(0, "VideoLoRALoadDiT", model=HUNYUAN, variant="auto"))
    graph.add(2, "VideoLoRAMergeLoRA", dit=applied[0], name="hunyuan_video_character_1_2")
    return graph


HUNYUAN_15_T2V, HUNYUAN_15_I2V = (
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
    "hunyuanvideo1.5_720p_i2v_fp16.safetensors",
)
HUNYUAN_15_VAE, SIGLIP = "hunyuanvideo15_vae_fp16.safetensors", "sigclip_vision_patch14_384.safetensors"
QWEN, BYT5 = "qwen_2.5_vl_7b.safetensors", "byt5_small_glyphxl_fp16.safetensors"
HUNYUAN_15_SHOT = Shot(width=848, height=480, frames=121, fps=24.0, steps=50, solver="euler", negative="")
_HUNYUAN_15_PROMPT = 'character_1, walking past a sign that says "Open"'


def _hunyuan_15_files(dit: str, image: bool = False) -> str:
    return f"""**Model files**
- `models/diffusion_models/{dit}`
- `models/vae/{HUNYUAN_15_VAE}`
- `models/text_encoders/{QWEN}` and `{BYT5}`""" + (f"\n- `models/clip_vision/{SIGLIP}`" if image else "")


def _hunyuan_15(graph: Graph, dit: str) -> tuple[Node, Node, Node]:
    """Model, VAE and text encoder."""
    model = graph.add(0, "VideoLoRALoadDiT", model=dit, variant="auto")
    vae = graph.add(0, "VideoLoRALoadVAE", model=HUNYUAN_15_VAE)
    llm = graph.add(0, "VideoLoRALoadQwenVL", model=QWEN)
    return model, vae, graph.add(0, "VideoLoRALoadByT5", llm=llm[0], model=BYT5)


def _hunyuan_15_train(graph: Graph, model: Node, vae: Node, text: Node, name: str, **latents: Any) -> Node:
    """From a folder to a LORAID; `latents` are further inputs of the node that caches them."""
    data = graph.add(1, "VideoLoRADatasetFolder", caption_extension=".txt", width=848, height=480, frames="49", repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder="character_1")  # fmt: skip
    cached = graph.add(1, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0], **latents)
    captions = graph.add(1, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    loraid = graph.add(1, "VideoLoRASelectLORAID", dit=model[0], loraid=1, units_per_id=12, unit="slot")
    network = graph.add(2, "VideoLoRANetworkSettings", rank=32, alpha=32.0)
    optimizer = graph.add(2, "VideoLoRAOptimizerSettings", learning_rate=1e-4, weight_decay=0.01, warmup_steps=0,
                          gradient_accumulation=1, max_grad_norm=1.0)  # fmt: skip
    return graph.add(2, "VideoLoRATrain", dit=model[0], latents=cached[0], text=captions[0], name=name, steps=1000, seed=42,
                     loraid=loraid[0], network=network[0], optimizer=optimizer[0])  # fmt: skip


def hunyuan15_t2v_train_loraid() -> Graph:
    graph = Graph(f"""# Train one LORAID of HunyuanVideo 1.5, then look at it
Put clips and a `.txt` caption for each into `ComfyUI/input/character_1`. What is written in a clip belongs into quotes in its
caption. The LoRA is written to `ComfyUI/output/loras`, in the form of which ComfyUI's own loader finds every key.

{_hunyuan_15_files(HUNYUAN_15_T2V)}""")
    dit, vae, text = _hunyuan_15(graph, HUNYUAN_15_T2V)
    train = _hunyuan_15_train(graph, dit, vae, text, "hunyuan15_character_1")
    applied = graph.add(2, "VideoLoRAApplyLoRA", dit=dit[0], loras=train[0], allow_overlap=False)
    _sampling(graph, 3, dit, applied[0], text, vae, _HUNYUAN_15_PROMPT, "video/hunyuan15_character_1",
              shot=HUNYUAN_15_SHOT)  # fmt: skip
    return graph


_HUNYUAN_15_VARIANT = """Text and image to video look alike in the files: if the file's name does not say which it is, choose the
variant in the loader."""


def hunyuan15_i2v_train() -> Graph:
    graph = Graph(f"""# Train HunyuanVideo 1.5 image-to-video
Put clips or pictures and a `.txt` caption for each into `ComfyUI/input/character_1`. The model and SigLIP are linked to Cache
Latents too: what the model is told of each clip's first frame is cached with the latents.
{_HUNYUAN_15_VARIANT}

{_hunyuan_15_files(HUNYUAN_15_I2V, image=True)}""")
    dit, vae, text = _hunyuan_15(graph, HUNYUAN_15_I2V)
    vision = graph.add(0, "VideoLoRALoadSigLIP", model=SIGLIP)
    _hunyuan_15_train(graph, dit, vae, text, "hunyuan15_character_1_i2v", dit=dit[0], clip_vision=vision[0])
    return graph


def hunyuan15_t2v_sample() -> Graph:
    graph = Graph(f"""# A video with HunyuanVideo 1.5
Words in quotes in the prompt are to be written in the video. Guidance is 6 and the flow shift 7, as the authors recommend; files
that are guidance-distilled (`cfg_distilled` in their names) have a guidance of 1.

{_hunyuan_15_files(HUNYUAN_15_T2V)}""")
    dit, vae, text = _hunyuan_15(graph, HUNYUAN_15_T2V)
    held = graph.add(1, "VideoLoRASamplingMemory", dit=dit[0], precision="fp8_scaled", block_swap=0, attention="sdpa",
                     compile=False)  # fmt: skip
    _sampling(graph, 1, dit, held[0], text, vae, _HUNYUAN_15_PROMPT, "video/hunyuan15_t2v", shot=HUNYUAN_15_SHOT)
    return graph


def hunyuan15_i2v_sample() -> Graph:
    graph = Graph(f"""# A video with HunyuanVideo 1.5 that begins with an image
Choose your own image. It is resized to cover the video and cropped to its middle.
{_HUNYUAN_15_VARIANT}

{_hunyuan_15_files(HUNYUAN_15_I2V, image=True)}""")
    dit, vae, text = _hunyuan_15(graph, HUNYUAN_15_I2V)
    vision = graph.add(0, "VideoLoRALoadSigLIP", model=SIGLIP)
    image = graph.add(1, "LoadImage", "Start image", (WIDTH, 330), image="start_image.png")
    _sampling(graph, 2, dit, dit[0], text, vae, _HUNYUAN_15_PROMPT, "video/hunyuan15_i2v", shot=HUNYUAN_15_SHOT,
              start_image=image[0], clip_vision=vision[0])  # fmt: skip
    return graph


def hunyuan15_t2v_merge() -> Graph:
    graph = Graph(f"""# Merge two LORAIDs into a HunyuanVideo 1.5 checkpoint
The new checkpoint is written to `ComfyUI/output/diffusion_models`, in the layout of the one it is made of: the official one, or
ComfyUI's with query, key and value in one. The order of the LoRAs does not matter.

**Model files**
- `models/diffusion_models/{HUNYUAN_15_T2V}`
- `output/loras/hunyuan15_character_1.safetensors` (LORAID 1) and `hunyuan15_character_2.safetensors` (LORAID 2)""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=HUNYUAN_15_T2V, variant="auto")
    first = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=1, lora="hunyuan15_character_1.safetensors")
    second = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=2, lora="hunyuan15_character_2.safetensors",
                       loras=first[0])  # fmt: skip
    applied = graph.add(1, "VideoLoRAApplyLoRA", dit=dit[0], loras=second[0], allow_overlap=False)
    graph.add(2, "VideoLoRAMergeLoRA", dit=applied[0], name="hunyuanvideo1.5_character_1_2")
    return graph


WORKFLOWS = {
    make.__name__: make
    for make in (
        wan_t2v_prepare_data, wan_t2v_train_loraid, wan_t2v_two_loraids, wan_t2v_merge, wan_i2v_train, wan_t2i_train,
        wan22_train_experts, wan22_t2v_sample, wan_i2v_sample, wan_flf2v_sample, wan_t2v_sample, wan_t2i_sample,
        wan_v2v_sample, wan_cfg_skip, wan_decode_latents, wan_t2v_lora_workbench,
        hunyuan_t2v_train_loraid, hunyuan_t2v_two_loraids, hunyuan_t2v_merge, hunyuan_t2v_sample, hunyuan_v2v_sample,
        skyreels_t2v_sample, skyreels_i2v_sample,
        hunyuan15_t2v_train_loraid, hunyuan15_i2v_train, hunyuan15_t2v_sample, hunyuan15_i2v_sample, hunyuan15_t2v_merge,
    )
}  # fmt: skip


def files(info: dict[str, dict]) -> dict[str, str]:
    """Path below workflows/ -> content, for all workflows; `info` is ComfyUI's /object_info."""
    made = {}
    for name, make in WORKFLOWS.items():
        graph = make()
        made[f"{name}.json"] = json.dumps(graph.editor(info), indent=1) + "\n"
        made[f"api/{name}.json"] = json.dumps(graph.api(info), indent=1) + "\n"
    return made
