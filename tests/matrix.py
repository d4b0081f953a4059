"""What the host tests have in common: images, requests with their budgets, model inputs and training batches."""

import torch

from adallava.hosts.model import Request
from adallava.hosts.prompts import encode, to_prompt
from adallava.mini.scenes import sample_scene, to_image
from tiny import placeholders

IMAGES = [to_image(sample_scene("test", 0, i)) for i in range(3)]
IMAGES[1] = IMAGES[1].crop((0, 0, 72, 40))  # hosts with native resolution make fewer tokens of it
BUDGETS = ("100%", "85%", "70%", "50%")


def options(host, **more):
    """Options for generate(): few tokens, and none that stands for an image."""
    return {"max_new_tokens": 6, "suppress_tokens": placeholders(host), **more}


def requests(host):
    """Requests with one image, two and none, at several budgets."""
    made = [Request("How many sevens are there?", IMAGES[i % 3], budget=b) for i, b in enumerate(BUDGETS)]
    made.append(Request("which", IMAGES[:2], budget="85%"))
    if not host.startswith("paligemma"):  # answers about images only
        made.append(Request("what is at the top-left?", budget="70%"))
    return made


def inputs_of(vlm, *questions):
    """Left-padded model inputs, question i about image i."""
    return tensors(encode(vlm.processor, [to_prompt(Request(q, IMAGES[i])) for i, q in enumerate(questions)]))


def tensors(inputs):
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def training_batch(vlm, rows=(0, 1)):
    """Right-padded conversations with two turns in one of them; labels on the answers."""
    tokenizer, mark = vlm.processor.tokenizer, vlm.processor.image_token
    texts = [
        f"USER: {mark} what color is the star ? ASSISTANT: red</s>USER: what is left ? ASSISTANT: seven</s>",
        f"USER: {mark} how many ? ASSISTANT: two</s>",
    ]
    made = vlm.processor(
        text=[texts[row] for row in rows],
        images=[[IMAGES[row]] for row in rows],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    batch = {name: value for name, value in tensors(made).items() if name != "labels"}
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(["red", "seven", "two", "</s>"]))
    batch["labels"] = batch["input_ids"].masked_fill(~torch.isin(batch["input_ids"], answers), -100)
    if vlm.model.config.model_type == "paligemma":  # marks what is not prompt: all from the first answer on
        batch["token_type_ids"] = (batch["labels"] != -100).cumsum(-1).clamp(max=1)
    return batch


def fastv_by_hand(model, inputs, layer, rank, steps):
    """Greedy FastV as a loop over whole layers, one prompt, no cache: ids, logits, kept tokens, embeddings."""
    model.set_attn_implementation("eager")
    text, answer, logits = model.model.language_model, [], []
    prompt = embeds = model.model(**inputs, output_hidden_states=True).hidden_states[0]
    image = (inputs["input_ids"] == model.config.image_token_id)[0]
    kept = attention = None
    for _ in range(steps):
        hidden, place = embeds, torch.arange(embeds.shape[1])
        for number, block in enumerate(text.layers):
            if number == layer:
                if kept is None:
                    scores = attention[0, :, -1].mean(0)
                    best = torch.tensor(sorted(image.nonzero()[:, 0].tolist(), key=lambda i: -scores[i])[:rank]).long()
                    kept = ~image
                    kept[best] = True
                stay = torch.cat((kept, torch.ones(embeds.shape[1] - len(kept), dtype=torch.bool)))
                hidden, place = hidden[:, stay], place[stay]
            causal = torch.full((len(place), len(place)), torch.finfo(torch.float32).min).triu(1)[None, None]
            rotary = text.rotary_emb(hidden, place[None])
            normed = block.input_layernorm(hidden)
            out, attention = block.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=causal)
            hidden = hidden + out
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        logits.append(model.lm_head(text.norm(hidden))[0, -1])
        answer.append(int(logits[-1].argmax()))
        embeds = torch.cat((embeds, text.embed_tokens(torch.tensor([[answer[-1]]]))), 1)
    return answer, torch.stack(logits), kept, prompt
