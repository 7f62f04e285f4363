"""Small Wan, HunyuanVideo and HunyuanVideo 1.5 checkpoints with the official tensor names, under the official file names.

The VAE is a real, if blurry, video codec (`small_vae.py`). The transformer is trained for a short while on simple
moving shapes, so that what a LoRA teaches it can be seen. The text encoder is random, but tells words apart. Those of
HunyuanVideo are random altogether.

    python devtools/small_models.py MODELS_FOLDER
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))

import clips
import pack
from small_vae import wan_vae_tensors
from tokenizer import train_tokenizer

DIT = "diffusion_models/wan2.1_t2v_1.3B_bf16.safetensors"
VAE = "vae/wan_2.1_vae.safetensors"
TEXT = "text_encoders/umt5_xxl_fp16.safetensors"
I2V = "diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors"
FLF2V = "diffusion_models/wan2.1_flf2v_720p_14B_fp16.safetensors"
HIGH = "diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors"
LOW = "diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors"
I2V_HIGH = "diffusion_models/wan2.2_i2v_high_noise_14B_fp16.safetensors"
VISION = "clip_vision/clip_vision_h.safetensors"
HUNYUAN = "diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors"
SKYREELS = "diffusion_models/skyreels_hunyuan_t2v_bf16.safetensors"
SKYREELS_I2V = "diffusion_models/skyreels_hunyuan_i2v_bf16.safetensors"
HUNYUAN_VAE = "vae/hunyuan_video_vae_bf16.safetensors"
LLAMA = "text_encoders/llava_llama3_fp16.safetensors"
CLIP_L = "text_encoders/clip_l.safetensors"
HUNYUAN_15_T2V = "diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors"
HUNYUAN_15_I2V = "diffusion_models/hunyuanvideo1.5_720p_i2v_fp16.safetensors"
HUNYUAN_15_VAE = "vae/hunyuanvideo15_vae_fp16.safetensors"
QWEN = "text_encoders/qwen_2.5_vl_7b.safetensors"
BYT5 = "text_encoders/byt5_small_glyphxl_fp16.safetensors"
SIGLIP = "clip_vision/sigclip_vision_patch14_384.safetensors"

TEXT_DIM = 4096  # ComfyUI knows Wan by this
CLIPS, FRAMES = 128, 13
STEPS, BATCH, RATE = 400, 8, 2e-3


def text_encoder(texts: list[str], dim: int = TEXT_DIM, inner: int = 128, heads: int = 2, depth: int = 2):
    """Tensors of a small umT5 as ComfyUI stores it, with its tokenizer inside."""
    import sentencepiece

    model = train_tokenizer(texts, 400)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    tensors = {"shared.weight": torch.randn(vocabulary, dim, generator=generator)}
    for index in range(depth):
        layers = f"encoder.block.{index}.layer"
        for name in "qkv":
            tensors[f"{layers}.0.SelfAttention.{name}.weight"] = random(inner, dim)
        tensors[f"{layers}.0.SelfAttention.o.weight"] = random(dim, inner)
        tensors[f"{layers}.0.SelfAttention.relative_attention_bias.weight"] = random(32, heads)
        tensors[f"{layers}.0.layer_norm.weight"] = torch.ones(dim)
        tensors[f"{layers}.1.DenseReluDense.wi_0.weight"] = random(64, dim)
        tensors[f"{layers}.1.DenseReluDense.wi_1.weight"] = random(64, dim)
        tensors[f"{layers}.1.DenseReluDense.wo.weight"] = random(dim, 64)
        tensors[f"{layers}.1.layer_norm.weight"] = torch.ones(dim)
    tensors["encoder.final_layer_norm.weight"] = torch.ones(dim)
    return {**{name: value.half() for name, value in tensors.items()},
            "spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}  # fmt: skip


def dit(dim: int = 256, ffn: int = 512, depth: int = 6, seed: int = 3, text_dim: int = TEXT_DIM) -> torch.nn.Module:
    """An untrained Wan transformer."""
    wan = pack.load("core.families.wan.dit")
    config = wan.WanConfig(
        dim=dim, ffn_dim=ffn, depth=depth, in_channels=16, out_channels=16, text_dim=text_dim, freq_dim=256
    )
    torch.manual_seed(seed)
    model = wan.WanDiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("modulation"):
                parameter.normal_(0, 0.02)
            elif name.endswith("bias") or name in ("head.head.weight", "time_projection.1.weight"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def image_to_video(tensors: dict[str, torch.Tensor], images: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of an image-to-video transformer made of those of a text-to-video one: it has not learnt to use the
    image, and is led by it all the same. Of so many `images` it takes CLIP features: 2 make a first-last-frame model, 0 one
    of Wan 2.2."""
    wan = pack.load("core.families.wan.dit")
    dim, clip, generator = tensors["patch_embedding.weight"].shape[0], 1280, torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5

    image = 0.3 * random(dim, 20, *wan.PATCH)
    made = {**tensors, "patch_embedding.weight": torch.cat((tensors["patch_embedding.weight"].float(), image), dim=1)}
    if not images:
        return {name: value.half() for name, value in made.items()}
    for norm, size in (("0", clip), ("4", dim)):
        made |= {f"img_emb.proj.{norm}.weight": torch.ones(size), f"img_emb.proj.{norm}.bias": torch.zeros(size)}
    for layer, size in (("1", clip), ("3", dim)):
        made |= {f"img_emb.proj.{layer}.weight": random(size, clip), f"img_emb.proj.{layer}.bias": torch.zeros(size)}
    if images > 1:
        made["img_emb.emb_pos"] = 0.02 * torch.randn(1, 2 * wan.CLIP_TOKENS, clip, generator=generator)
    for block in {name.split(".")[1] for name in tensors if name.startswith("blocks.")}:
        for name in ("k_img", "v_img"):
            made[f"blocks.{block}.cross_attn.{name}.weight"] = 0.3 * random(dim, dim)
            made[f"blocks.{block}.cross_attn.{name}.bias"] = torch.zeros(dim)
        made[f"blocks.{block}.cross_attn.norm_k_img.weight"] = torch.ones(dim)
    return {name: value.half() for name, value in made.items()}


def image_encoder(dim: int = 1280, inner: int = 64, depth: int = 2) -> dict[str, torch.Tensor]:
    """Tensors of a CLIP image tower of the real width, and hardly any depth, as ComfyUI stores it."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(dim), f"{name}.bias": torch.zeros(dim)}

    top = "vision_model"
    tensors = {
        f"{top}.embeddings.class_embedding": torch.zeros(dim),
        f"{top}.embeddings.patch_embedding.weight": random(dim, 3, 14, 14),
        f"{top}.embeddings.position_embedding.weight": 0.1 * torch.randn(257, dim, generator=generator),
        **norm(f"{top}.pre_layrnorm"), **norm(f"{top}.post_layernorm"),
        "visual_projection.weight": random(8, dim),
    }  # fmt: skip
    for index in range(depth):
        layer = f"{top}.encoder.layers.{index}"
        tensors |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        for name, outputs, inputs in (
            *((f"self_attn.{part}_proj", dim, dim) for part in ("q", "k", "v", "out")), ("mlp.fc1", inner, dim), ("mlp.fc2", dim, inner),
        ):  # fmt: skip
            tensors |= {f"{layer}.{name}.weight": random(outputs, inputs), f"{layer}.{name}.bias": torch.zeros(outputs)}
    return {name: value.half() for name, value in tensors.items()}


def expert(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """One of two experts: a text-to-video transformer that is a little off."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value.float() * (1 + 0.01 * torch.randn(value.shape, generator=generator))).half()
        for name, value in tensors.items()
    }


def random_tensors(model: torch.nn.Module, seed: int, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    """Values for a model on the meta device that keep what goes through it at its size."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            made[name] = torch.randn(value.shape, generator=generator) * torch.Size(value.shape[1:]).numel() ** -0.5
        else:
            made[name] = torch.zeros(value.shape) if name.endswith("bias") else torch.ones(value.shape)
    return {prefix + name: value.to(dtype) for name, value in made.items()}


def hunyuan_dit(in_channels: int, seed: int) -> dict[str, torch.Tensor]:
    """A HunyuanVideo transformer for the prompts of `llama`."""
    hunyuan = pack.load("core.families.hunyuan_video.dit")
    config = hunyuan.HunyuanVideoConfig(
        dim=128, ffn_dim=512, double_depth=2, single_depth=4, refiner_depth=2, in_channels=in_channels, out_channels=16,
        text_dim=128, pooled_dim=768, freq_dim=256, guidance=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = hunyuan.HunyuanVideoDiT(config)
    return random_tensors(model, seed, torch.bfloat16)


def hunyuan_vae() -> dict[str, torch.Tensor]:
    hunyuan = pack.load("core.families.hunyuan_video.vae")
    with torch.device("meta"):
        model = hunyuan.HunyuanVAE(hunyuan.HunyuanVAEConfig(widths=(32, 32, 32, 32), latent_channels=16))
    return random_tensors(model, 12, torch.bfloat16)


def llama() -> dict[str, torch.Tensor]:
    """LLaVA-Llama-3 with its whole vocabulary, hardly any width, and the two blocks more that are not used."""
    text = pack.load("core.families.hunyuan_video.text")
    with torch.device("meta"):
        model = text.Llama(text.LlamaConfig(vocabulary=128320, dim=128, ffn_dim=256, kv_heads=1, depth=4))
    return random_tensors(model, 13, torch.float16, "model.")


def clip_l() -> dict[str, torch.Tensor]:
    text = pack.load("core.families.hunyuan_video.text")
    with torch.device("meta"):
        model = text.CLIPText(text.CLIPTextConfig(vocabulary=49408, dim=768, ffn_dim=64, depth=2))
    return random_tensors(model, 14, torch.float16, "text_model.")


def hunyuan_15_dit(seed: int) -> dict[str, torch.Tensor]:
    """A HunyuanVideo 1.5 transformer for the prompts of `qwen`, in ComfyUI's layout: query, key and value in one."""
    hunyuan = pack.load("core.families.hunyuan_video_15.dit")
    config = hunyuan.HunyuanVideo15Config(
        dim=128, ffn_dim=512, double_depth=5, refiner_depth=2, in_channels=65, out_channels=32, text_dim=128, freq_dim=256,
        glyph_dim=1472, glyph_hidden=2048, vision_dim=1152, step_distilled=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = hunyuan.HunyuanVideo15DiT(config)
    apart, made = random_tensors(model, seed, torch.float16), {}
    for name, value in apart.items():
        if "_attn_q." in name:
            parts = [apart[name.replace("_attn_q.", f"_attn_{letter}.")] for letter in "qkv"]
            made[name.replace("_attn_q.", "_attn_qkv.")] = torch.cat(parts)
        elif "_attn_k." not in name and "_attn_v." not in name:
            made[name] = value
    return made


def hunyuan_15_vae() -> dict[str, torch.Tensor]:
    hunyuan = pack.load("core.families.hunyuan_video_15.vae")
    with torch.device("meta"):
        model = hunyuan.HunyuanVideo15VAE(
            hunyuan.HunyuanVideo15VAEConfig(widths=(8, 16, 16, 16, 64), latent_channels=32)
        )
    return random_tensors(model, 18, torch.float16)


def qwen() -> dict[str, torch.Tensor]:
    """Qwen2.5-VL without what looks at images, with its whole vocabulary, hardly any width, and the two blocks more that are
    not used."""
    text = pack.load("core.families.hunyuan_video.text")
    config = text.LlamaConfig(vocabulary=152064, dim=128, ffn_dim=256, kv_heads=1, depth=4, qkv_bias=True)
    with torch.device("meta"):
        model = text.Llama(config)
    return random_tensors(model, 19, torch.float16, "model.")


def byt5() -> dict[str, torch.Tensor]:
    text = pack.load("core.families.hunyuan_video_15.text")
    config = text.ByT5Config(vocabulary=1510, dim=1472, ffn_dim=64, heads=6, head_dim=64, depth=2, buckets=32)
    with torch.device("meta"):
        model = text.build(config)
    tensors = random_tensors(model, 20, torch.float16)
    return {name.replace("encoder.embed_tokens.", "shared."): value for name, value in tensors.items()}


def siglip() -> dict[str, torch.Tensor]:
    vision = pack.load("core.families.hunyuan_video_15.vision")
    with torch.device("meta"):
        model = vision.SigLIP(vision.SigLIPConfig(dim=1152, ffn_dim=64, depth=2))
    return random_tensors(model, 21, torch.float16, "vision_model.")


def pretrain(model: torch.nn.Module, latents: torch.Tensor, states: list) -> None:
    """Teach the transformer moving shapes."""
    wan, flow = pack.load("core.families.wan.dit"), pack.load("core.flow")
    texts = [next(iter(state.values())) for state in states]
    tokens = max(map(len, texts)) + 1
    text = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, tokens - len(one))) for one in texts])
    generator = torch.Generator().manual_seed(11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    begin, losses = time.monotonic(), []
    cross = _cross_attention_with_few_pads(wan.TEXT_TOKENS - tokens + 1)
    with mock.patch.object(wan, "TEXT_TOKENS", tokens), mock.patch.object(wan.Attention, "cross", cross):
        for step in range(STEPS):
            chosen = torch.randint(len(latents), (BATCH,), generator=generator)
            data = latents[chosen]
            noise = torch.randn(data.shape, generator=generator)
            sigma = flow.shifted(torch.sigmoid(torch.randn(BATCH, generator=generator)), 3.0)
            output = model(flow.noised(data, noise, sigma), flow.model_time(sigma), text_states=text[chosen])
            loss = torch.nn.functional.mse_loss(output, flow.velocity(data, noise))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if (step + 1) % 100 == 0:
                recent, seconds = sum(losses[-100:]) / 100, time.monotonic() - begin
                print(f"  step {step + 1} of {STEPS}, loss {recent:.3f}, {seconds:.0f} s", flush=True)


def _cross_attention_with_few_pads(pads: int):
    """Cross-attention where the last text token stands for `pads` equal ones: the same result in half of the time.

    Equal keys and values share their weight, so one of them with log(pads) added to its logit does for all.
    """

    def cross(self, x: torch.Tensor, text: torch.Tensor, image: None) -> torch.Tensor:
        q, k, v = self._split(self.norm_q(self.q(x))), self._split(self.norm_k(self.k(text))), self._split(self.v(text))
        bias = torch.zeros(1, text.shape[1])
        bias[:, -1] = math.log(pads)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.o(y.transpose(1, 2).flatten(2))

    return cross


def main(folder: Path) -> None:
    """Make what is not there yet."""
    if not all((folder / name).exists() for name in (DIT, VAE, TEXT)):
        make_trained(folder)
    make_relatives(folder)


def make_relatives(folder: Path) -> None:
    """What follows from the trained transformer, the image encoder, and those of HunyuanVideo and 1.5."""
    safetensors = pack.load("core.io.safetensors")
    relatives = {
        I2V: lambda: image_to_video(safetensors.load(folder / DIT)[0]),
        FLF2V: lambda: image_to_video(safetensors.load(folder / DIT)[0], images=2),
        I2V_HIGH: lambda: image_to_video(safetensors.load(folder / DIT)[0], images=0),
        HIGH: lambda: expert(safetensors.load(folder / DIT)[0], 1),
        LOW: lambda: expert(safetensors.load(folder / DIT)[0], 2),
        VISION: image_encoder,
        HUNYUAN: lambda: hunyuan_dit(16, seed=8),
        SKYREELS: lambda: hunyuan_dit(16, seed=9),
        SKYREELS_I2V: lambda: hunyuan_dit(32, seed=10),
        HUNYUAN_VAE: hunyuan_vae,
        LLAMA: llama,
        CLIP_L: clip_l,
        HUNYUAN_15_T2V: lambda: hunyuan_15_dit(seed=16),
        HUNYUAN_15_I2V: lambda: hunyuan_15_dit(seed=17),
        HUNYUAN_15_VAE: hunyuan_15_vae,
        QWEN: qwen,
        BYT5: byt5,
        SIGLIP: siglip,
    }
    for name, make in relatives.items():
        if not (folder / name).exists():
            safetensors.save(folder / name, make(), {})


def make_trained(folder: Path) -> None:
    """VAE, text encoder, and the transformer that learns moving shapes."""
    safetensors = pack.load("core.io.safetensors")
    families = pack.load("core.families")
    caching = pack.load("core.data.caching")
    weights = pack.load("core.weights")
    print("rendering clips to train the small transformer on", flush=True)
    rendered = [clips.render_generic(seed, FRAMES) for seed in range(CLIPS)]
    texts = [caption for _, caption in rendered] + list(clips.CHARACTERS) + list(clips.CHARACTERS.values())
    safetensors.save(folder / VAE, wan_vae_tensors(), {})
    safetensors.save(folder / TEXT, text_encoder(texts), {})
    family = families.FAMILIES["wan"]
    checkpoint, part = families.open_part(folder / VAE, "vae")
    vae = weights.load_into(family.build_vae(part.config), checkpoint, part.keymap, torch.float32)
    checkpoint, part = families.open_part(folder / TEXT, "text_encoder")
    encoder = family.load_text(checkpoint, part, torch.float32)
    cpu = torch.device("cpu")
    videos = caching.to_video([frames for frames, _ in rendered], cpu)
    latents = torch.cat([family.latent.to_model(vae.encode(some)) for some in videos.split(8)])
    states = encoder.encode([caption for _, caption in rendered])
    model = dit()
    print("training the small transformer", flush=True)
    pretrain(model, latents, states)
    tensors = {name: value.detach().bfloat16() for name, value in model.state_dict().items()}
    safetensors.save(folder / DIT, tensors, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
