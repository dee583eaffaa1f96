"""The model that holds both levels: a pretext and a downstream model with a backbone each."""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..data.preprocessing import warn_of_other_preprocessing
from .adapters import adapter_of, add_adapter, check_adapters, frozen_parameters, merged, unwrap, write_adapter
from .auto import register_class, resolve_class
from .backbone import backbone_of, backbone_parameters, backbone_prefix, load_backbone
from .batch_norm import has_batch_norm, recalibrate_batch_norm
from .classifier import classifier_on, labels_of_task
from .configuration_bissl import BiSSLConfig
from .image_size import adapt_image_size
from .pretext import build_pretext_model
from .saving import save_model
from .shared_parameters import find_shared_parameters, report_unshared

PASSES = ("lower", "upper", "aligned")
EXPORT_LEVELS = ("aligned", "upper")


class BiSSLModel(PreTrainedModel):
    """Two complete models side by side. `lower` is the pretext model (theta_P, phi_P), `upper` the downstream model
    (theta_D, phi_D).

    The backbone theta is what their base models have in common: the parameters of the same name and shape that are
    trainable in both. One that only one of them trains is that level's own. Heads are everything else that is
    trainable; a head's tensor that is tied to the backbone belongs to the backbone. Build one with
    [`BiSSLModel.from_models`] or [`BiSSLModel.from_backbone`].

    Args:
        config ([`BiSSLConfig`])

    Raises:
        `ValueError`: if the two models share no backbone, or differ in parameters that are not declared as unshared.
    """

    config_class = BiSSLConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: BiSSLConfig) -> None:
        super().__init__(config)
        self.lower: PreTrainedModel = resolve_class(config.lower_class)(config.lower_config)
        self.upper: PreTrainedModel = resolve_class(config.upper_class, field="upper_class")(config.upper_config)
        for level, adapter in ((self.lower, config.lower_adapter), (self.upper, config.upper_adapter)):
            if adapter is not None:
                add_adapter(level, adapter)
        self._shared_names: tuple[str, ...] | None = None
        self._freeze()
        self._tied_weights_keys = self._frozen_ties()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Both models initialise their own layers."""

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether both models do."""
        return bool(self.lower.supports_gradient_checkpointing and self.upper.supports_gradient_checkpointing)

    def _freeze(self) -> None:
        for name in self.config.frozen_parameters:
            self.get_parameter(name).requires_grad_(False)

    def _frozen_ties(self) -> dict[str, str]:
        """Returns the frozen parameters that both base models have, upper name -> lower name: they are one set of
        tensors."""
        lower, upper = f"lower.{backbone_prefix(self.lower)}", f"upper.{backbone_prefix(self.upper)}"
        frozen = set(self.config.frozen_parameters)
        others = backbone_parameters(self.upper)
        return {
            upper + name: lower + name
            for name, parameter in backbone_parameters(self.lower).items()
            if {lower + name, upper + name} <= frozen and name in others and others[name].shape == parameter.shape
        }

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Returns which tensors are one, see [`~transformers.PreTrainedModel.get_expanded_tied_weights_keys`]: those
        that each level ties itself, and the frozen backbone, whatever `tie_word_embeddings` says."""
        own = super().get_expanded_tied_weights_keys(all_submodels) if all_submodels else {}
        return {**own, **(self._tied_weights_keys or {})}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        lower_class: type[PreTrainedModel] | None = None,
        upper_class: type[PreTrainedModel] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads both levels, see [`~transformers.PreTrainedModel.from_pretrained`]. What was frozen when they were
        joined is frozen again: loading replaces each parameter by one that requires gradients.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id.
            lower_class, upper_class (`type`, *optional*): class of a level, if it is neither of transformers nor of
                bissl_hf. A class is never imported because a checkpoint names it.
            *model_args, **kwargs: of `PreTrainedModel.from_pretrained`.

        Raises:
            `TypeError`: if a given class is no model class.
            `ValueError`: if a class is missing, or another than the checkpoint's.
        """
        given = {name: kind for name, kind in (("lower_class", lower_class), ("upper_class", upper_class)) if kind}
        if given:
            kwargs["config"] = _config_with_classes(pretrained_model_name_or_path, given, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    @classmethod
    def from_models(
        cls,
        lower: PreTrainedModel,
        upper: PreTrainedModel,
        *,
        unshared_parameters: Sequence[str] = ("pooler.",),
    ) -> "BiSSLModel":
        """Joins a pretext and a downstream model; theta_D starts from theta_P. Frozen parameters that both base models
        have become one set of tensors, with the lower model's values; buffers are copied to the upper one too. The
        weights are copied: neither argument is changed.

        With adapters of `peft` in both models (`model.add_adapter(LoraConfig(...))` or `get_peft_model`) theta is the
        adapters' parameters. `peft` freezes the heads along with the backbone; here they are trained.

        Args:
            lower (`PreTrainedModel` or `peft.PeftModel`): pretext model; `lower(**inputs).loss` is L_P.
            upper (`PreTrainedModel` or `peft.PeftModel`): downstream model; `upper(**inputs).loss` is L_D.
            unshared_parameters (`Sequence[str]`, *optional*, defaults to `("pooler.",)`): patterns (a prefix or a
                shell pattern) of names below the base models of parameters that only one of them has or trains.

        Raises:
            `TypeError`: if an argument is not a `PreTrainedModel`.
            `ValueError`: see above.
        """
        lower, upper = unwrap(lower), unwrap(upper)
        for name, model in (("lower", lower), ("upper", upper)):
            if not isinstance(model, PreTrainedModel):
                raise TypeError(f"{name} is a {type(model).__name__}; it must be a transformers PreTrainedModel.")
        check_adapters(lower, upper)
        shared = find_shared_parameters(lower, upper, unshared_parameters)
        config = BiSSLConfig(
            lower_config=copy.deepcopy(lower.config),
            upper_config=copy.deepcopy(upper.config),
            lower_class=register_class(type(lower)),
            upper_class=register_class(type(upper)),
            unshared_parameters=unshared_parameters,
            frozen_parameters=[
                f"{level}.{name}"
                for level, source in (("lower", lower), ("upper", upper))
                for name in frozen_parameters(source)
            ],
            lower_adapter=adapter_of(lower),
            upper_adapter=adapter_of(upper),
        )
        model = cls(config)
        # The lower model last: its values are those of the frozen tensors that both have.
        for level, source in (("upper", upper), ("lower", lower)):
            own = getattr(model, level)
            own.to(device=source.device, dtype=source.dtype)  # first, so that buffers keep their precision
            own.load_state_dict(source.state_dict())
            for target, parameter in zip(own.parameters(), source.parameters(), strict=True):
                target.data = parameter.detach().clone()
                target.requires_grad_(True)
        model._freeze()
        model._shared_names = shared
        model.start_upper_from_lower()
        report_unshared(lower, upper)
        return model

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        *,
        id2label: Mapping[int, str] | None = None,
        num_labels: int | None = None,
        task: Any = None,
        pretext: str = "simclr",
        **settings: Any,
    ) -> "BiSSLModel":
        """Builds both levels on a backbone with its weights, which are copied: the model of a pretext task, and an
        image classifier with a new head.

        Args:
            backbone (`str` or `PreTrainedModel`): a folder, a Hub id, or a model (its backbone counts).
            id2label (`Mapping[int, str]`, *optional*): names of the classes by their numbers, from 0.
            num_labels (`int`, *optional*): number of classes, in place of their names.
            task ([`DownstreamTask`], *optional*): in place of both. The backbone is made to take images of its size.
            pretext (`str`, *optional*, defaults to `"simclr"`): name of the pretext task.
            **settings: of the pretext task, see [`~models.pretext.build_pretext_model`].

        Raises:
            `ValueError`: if not exactly one of `id2label`, `num_labels` and `task` is given, for an unknown pretext
                task, or a backbone that does not take images of the task's size.

        Example:

        ```python
        >>> from transformers import ResNetConfig, ResNetModel
        >>> from bissl_hf import BiSSLModel
        >>> backbone = ResNetModel(ResNetConfig(hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"))
        >>> model = BiSSLModel.from_backbone(backbone, id2label={0: "cat", 1: "dog"}, temperature=0.2)
        >>> type(model.lower).__name__, type(model.upper).__name__
        ('SimCLRForPreTraining', 'ResNetForImageClassification')
        ```
        """
        class_names, problem_type = labels_of_task(id2label, num_labels, task)
        source = load_backbone(backbone)
        if task is not None:
            source = adapt_image_size(source, task.image_size)
            if isinstance(backbone, str):
                warn_of_other_preprocessing(backbone, task.preprocessing)
        lower = build_pretext_model(pretext, source, **settings)
        return cls.from_models(lower, classifier_on(source, class_names, problem_type=problem_type))

    def start_upper_from_lower(self) -> None:
        """Sets theta_D to theta_P, and copies what else both backbones have: frozen parameters, those that only one
        level trains, and buffers."""
        everything = tuple(backbone_parameters(self.lower))
        self._copy_backbone(backbone_of(self.lower), backbone_of(self.upper), everything)

    @staticmethod
    @torch.no_grad()
    def _copy_backbone(source: nn.Module, target: nn.Module, shared: Sequence[str]) -> None:
        """Copies shared and common frozen parameters, and common buffers."""
        targets = dict(target.named_parameters())
        for name, parameter in source.named_parameters():
            other = targets.get(name)
            if other is None or other.shape != parameter.shape:
                continue
            if name in shared or not (parameter.requires_grad or other.requires_grad):
                other.copy_(parameter)
        buffers = dict(target.named_buffers())
        for name, buffer in source.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffers[name].copy_(buffer)

    # What belongs to whom

    @property
    def shared_parameter_names(self) -> tuple[str, ...]:
        """Names of the backbone's parameters below the base models, in their order. Found once: freezing a parameter
        later does not move it out of the backbone."""
        if self._shared_names is None:
            self._shared_names = find_shared_parameters(self.lower, self.upper, self.config.unshared_parameters)
        return self._shared_names

    def backbone_parameters(self, level: str) -> tuple[nn.Parameter, ...]:
        """theta_P of `"lower"` or theta_D of `"upper"`, in the order of `shared_parameter_names`."""
        parameters = backbone_parameters(getattr(self, level))
        return tuple(parameters[name] for name in self.shared_parameter_names)

    def head_parameters(self, level: str) -> tuple[nn.Parameter, ...]:
        """phi_P of `"lower"` or phi_D of `"upper"`: what the level's model trains beside its backbone."""
        backbone = {id(parameter) for parameter in self.backbone_parameters(level)}
        return tuple(p for p in getattr(self, level).parameters() if p.requires_grad and id(p) not in backbone)

    # Forward passes

    def forward(self, level: str = "aligned", **inputs: Any) -> Any:
        """Runs one of the models on its inputs, given as keywords.

        Args:
            level (`str`, *optional*, defaults to `"aligned"`): `"lower"`, `"upper"`, or `"aligned"`, the upper model
                with theta_P in the place of theta_D. The first two move their running statistics in train mode, the
                last works on copies of the lower model's.

        Raises:
            `ValueError`: for another level.
        """
        if level not in PASSES:
            raise ValueError(f"level is {level!r}; it must be one of {', '.join(PASSES)}.")
        return self.without_side_effects("aligned")(**inputs) if level == "aligned" else getattr(self, level)(**inputs)

    def without_side_effects(self, level: str) -> Callable[..., Any]:
        """Returns a level's forward pass without side effects: buffers (running statistics) are copied for each call.
        Gradients reach the parameters themselves: theta_P and phi_D for `"aligned"`.

        Raises:
            `ValueError`: for another level.
        """
        if level not in PASSES:
            raise ValueError(f"level is {level!r}; it must be one of {', '.join(PASSES)}.")
        return partial(self._call_with_copies, level)

    def _call_with_copies(self, level: str, **inputs: Any) -> Any:
        model = self.lower if level == "lower" else self.upper
        tensors: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if level == "aligned":
            prefix = backbone_prefix(self.upper)
            source = backbone_of(self.lower)
            parameters, buffers = dict(source.named_parameters()), dict(source.named_buffers())
            tensors |= {prefix + name: parameters[name] for name in self.shared_parameter_names}
            tensors |= {
                prefix + name: buffer.clone()
                for name, buffer in buffers.items()
                if (other := tensors.get(prefix + name)) is not None and other.shape == buffer.shape
            }
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            # A functional call ends before the backward pass computes layers again, which would then see the live
            # tensors. A copy of the modules around the same parameters keeps those put in here.
            live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            kept: dict[int, Any] = {id(tensor): tensors.get(name, tensor) for name, tensor in live.items()}
            return copy.deepcopy(model, kept)(**inputs)
        return functional_call(model, tensors, kwargs=inputs)

    # What users take away

    def aligned_model(self) -> PreTrainedModel:
        """Returns the aligned model, theta_P with phi_D, as a native copy of the upper model's class. Adapters are
        merged into the weights that they adapt."""
        return merged(self._aligned_copy())

    def _aligned_copy(self) -> PreTrainedModel:
        model = copy.deepcopy(self.upper)
        self._copy_backbone(backbone_of(self.lower), backbone_of(model), self.shared_parameter_names)
        return model

    def _downstream_copy(self, level: str) -> PreTrainedModel:
        if level not in EXPORT_LEVELS:
            raise ValueError(f"level is {level!r}; it must be one of {', '.join(EXPORT_LEVELS)}.")
        return self._aligned_copy() if level == "aligned" else copy.deepcopy(self.upper)

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        processing_class: Any = None,
        recalibrate_on: Iterable[dict[str, Any]] | None = None,
        adapter_only: bool = False,
        level: str = "aligned",
    ) -> PreTrainedModel:
        """Writes the aligned model, or the upper one, as a checkpoint of the upper model's class, which needs this
        package no more. Files are written aside first, so that a failure leaves what is in `directory` as it was.

        Args:
            directory (`str` or `os.PathLike`): created if need be.
            processing_class (*optional*): image processor or tokenizer to write beside the model.
            recalibrate_on (`Iterable[dict]`, *optional*): inputs of the upper model (evaluation transform, on its
                device) from which batch-norm statistics are estimated; labels in them are not used.
            adapter_only (`bool`, *optional*, defaults to `False`): whether to write the adapter and the head alone,
                in the format of `peft` (`adapter_config.json`, `adapter_model.safetensors`), for
                `PeftModel.from_pretrained(model, directory)` on the model that they were trained on.
            level (`str`, *optional*, defaults to `"aligned"`): `"aligned"`, theta_P with phi_D, or `"upper"`, theta_D
                with phi_D.

        Returns:
            `PreTrainedModel`: the model that was written, in evaluation mode, with adapters merged.

        Raises:
            `ValueError`: for another level, or if `adapter_only` is true and the model has no adapters.
        """
        if adapter_only:
            write_adapter(self._downstream_copy(level), directory, processing_class)
            return merged(self._downstream_copy(level)).eval()
        model = merged(self._downstream_copy(level))
        if recalibrate_on is not None:
            recalibrate_batch_norm(model, recalibrate_on)
        elif has_batch_norm(model) and level == "aligned":
            warnings.warn(
                "The aligned model has batch norm and is exported with the statistics of pretext views; pass "
                "recalibrate_on "
                "to estimate them on downstream images.",
                stacklevel=2,
            )
        model.eval()
        save_model(model, directory, processing_class)
        return model


def _config_with_classes(
    source: Any, given: Mapping[str, type[PreTrainedModel]], options: Mapping[str, Any]
) -> BiSSLConfig:
    """Returns the configuration of a checkpoint with classes that the user has passed."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    settings, _ = BiSSLConfig.get_config_dict(source, **{name: options[name] for name in names if name in options})
    for field, model_class in given.items():
        name = register_class(model_class)
        if str(settings.get(field)).rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"{field} is {model_class.__name__}, and the checkpoint {source} was written with "
                f"{settings.get(field)}; pass the class of that name, or leave {field} out."
            )
        settings[field] = name
    return BiSSLConfig.from_dict(settings)
