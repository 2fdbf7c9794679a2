"""OpenAI's bodies, as far as they are served here: what a request may say, and how answers look.

Only what is done is accepted: a field that would be ignored is refused, unless it can't change an answer (`user`,
`metadata`, ...). Types are strict, so that the OpenAPI document says what is so.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

Purpose = Literal["vision", "user_data"]
Zero = Annotated[float, Field(ge=0, le=0)] | None
Nothing = Annotated[list[None], Field(max_length=0)] | None


def _writable(text: str) -> str:
    text.encode()  # JSON can name half a character ("\\ud800"), which no tokenizer reads
    return text


Text = Annotated[str, AfterValidator(_writable)]
StopText = Annotated[Text, Field(min_length=1, max_length=1024)]
Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Said(BaseModel):
    """What a client says."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Said):
    type: Literal["text"]
    text: Text


class ImageUrl(Said):
    url: str = Field(description="A data URI (base64), or http(s) of a host that the server fetches from.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Without effect: a model has one canvas.")


class ImagePart(Said):
    type: Literal["image_url"]
    image_url: ImageUrl


class FileId(Said):
    file_id: str = Field(description="Of a picture that was uploaded to /v1/files.")


class FilePart(Said):
    type: Literal["file"]
    file: FileId


UserPart = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class SystemTurn(Said):
    role: Literal["system", "developer"]
    content: Text | list[TextPart]


class UserTurn(Said):
    role: Literal["user"]
    content: Text | list[UserPart]


class AssistantTurn(Said):
    role: Literal["assistant"]
    content: Text | list[TextPart]
    refusal: None = None  # as answers of ours have it, which are sent back


class StreamOptions(Said):
    include_usage: bool = False


class TextFormat(Said):
    type: Literal["text"]


class Wanted(Said):
    """What both kinds of completions take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="Default: 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(None, description="Default: 1.")
    seed: Int64 | None = Field(None, description="The same request with the same seed has the same answer.")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Without effect.")


class ChatRequest(Wanted):
    messages: Annotated[
        list[Annotated[SystemTurn | UserTurn | AssistantTurn, Field(discriminator="role")]], Field(min_length=1)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, description="Without effect.")
    safety_identifier: str | None = Field(None, description="Without effect.")
    prompt_cache_key: str | None = Field(None, description="Without effect.")


class TextRequest(Wanted):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=1)]
    ) = Field(description="One text, or its token ids, which are read as they are.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = Field(None, description="Put the prompt before the answer; with logprobs, its tokens' as well.")
    suffix: None = None
    best_of: Literal[1] | None = None


class Candidate(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a token that is not whole characters.")


class ChatToken(Candidate):
    top_logprobs: list[Candidate]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null: a repeated prompt's first, which nothing precedes.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in the tokens' texts, one behind the other.")


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: Literal[0] = 0
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class TextChoice(BaseModel):
    index: Literal[0] = 0
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody | None = None


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str


class ChunkChoice(BaseModel):
    index: Literal[0] = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None


class ModelBody(BaseModel):
    """OpenAI's four fields, and what this server knows of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    sees: bool = Field(description="Whether it takes pictures.")
    boxes: bool = Field(description="Whether it was taught to answer with boxes.")
    context: int = Field(description="Positions that prompt and answer may have together.")
    parameters: int
    geometry: str = Field(description="How pictures become its canvas, which boxes are shares of: square, pad or crop.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class FileBody(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Health(BaseModel):
    status: Literal["ok", "draining"]
