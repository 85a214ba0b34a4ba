# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What every number of `results.json` of an analysis is: its place, without indices of lists, and its unit."""

_INTERVAL = "; mean over images with its 95 % bootstrap interval (low, high) over n images"
_NORM = "L2 norm of the residual stream before the final norm"

UNITS: dict[str, str] = {
    "model.parameters": "parameters",
    "model.layers": "blocks",
    "model.patch_size": "pixels (height, width)",
    "model.cls_tokens": "tokens",
    "model.registers": "tokens",
    "images.measured": "images",
    "images.classes": "folders of images",
    "images.grid": "patches (rows, columns)",
    "images.how.batch_size": "images",
    "images.how.image_size": "pixels",
    "outliers.layer": "index of the block after which norms are compared, from 1",
    "outliers.rule_value": "number of the cutoff rule",
    "outliers.cutoff": _NORM,
    "outliers.norm": f"{_NORM}, over all patches of all images",
    "outliers.share": f"share of an image's patches above the cutoff{_INTERVAL}",
    "outliers.images_with_outliers": "share of images with at least one outlier",
    "outliers.largest_over_median": f"largest norm of an image over its median norm{_INTERVAL}",
    "outliers.first_layer": "first block after which the share above the cutoff reaches half of the final share",
    "outliers.on_border": "share of all outliers that lie in the outermost ring of patches",
    "outliers.border_patches": "share of all patches that lie there",
    "outliers.neighbour_similarity": f"cosine similarity to the 4 neighbours after the patch embedding{_INTERVAL}",
    "outliers.two_groups.dip": "Hartigan's dip of log norms",
    "outliers.two_groups.p_value": "probability of such a dip with one group",
    "outliers.two_groups.bic_gain": "BIC of one Gaussian minus that of two, over log norms",
    "outliers.two_groups.low_mode": f"{_NORM}, median of the lower group",
    "outliers.two_groups.high_mode": f"{_NORM}, median of the upper group",
    "outliers.two_groups.high_share": "share of patches in the upper group",
    "outliers.two_groups.n": "patches tested",
    "layers.layer": "index of the state: 0 is what the first block gets, i what block i leaves",
    "layers.norm_percentile_2": f"{_NORM}, over all patches of all images",
    "layers.norm_median": f"{_NORM}, over all patches of all images",
    "layers.norm_percentile_98": f"{_NORM}, over all patches of all images",
    "layers.norm_max": f"{_NORM}, over all patches of all images",
    "layers.outlier_share": "share of all patches above the cutoff",
    "layers.infinity_norm": "largest magnitude of any token and channel, mean over images",
    "layers.peak.channel": "channel of the largest value of an image, most frequently",
    "layers.peak.agreement": "share of images in which channel and kind of token are these",
    "layers.kurtosis": "Pearson's kurtosis of all values of an image (a Gaussian has 3), mean over images",
    "layers.sigma_outliers": "values beyond 6 standard deviations, per image",
    "layers.massive": "activations above 100 and 1,000 times the median magnitude, per image",
    "layers.relatively_massive": "activations above 1,000 times the median magnitude, per image",
    "attention.tokens.entropy": f"nats, of the last layer's map over patches, mean of heads{_INTERVAL}",
    "attention.tokens.area": f"share of the image, exp(entropy) / patches, last layer{_INTERVAL}",
    "attention.tokens.centre": "centre of mass (row, column) from 0 to 1, last layer, mean over images",
    "attention.tokens.mass": "share of attention on CLS, registers, patches, last layer, mean over images and heads",
    "attention.tokens.norm": f"L2 norm of the token before the final norm{_INTERVAL}",
    "attention.overlap": "attention that two tokens spend on the same patches, from 0 to 1, mean over images",
    "attention.cls_mass": "share of CLS attention on CLS, registers, patches per layer, mean over images and heads",
    "attention.cls_on_registers": f"share of CLS attention on registers in the last layer, mean of heads{_INTERVAL}",
    "attention.patch_only_cka": "linear CKA of what CLS takes from all tokens and from patches alone, last layer",
    "attention.patch_only_cka_images": "images",
    "sinks.tokens.score": "share of heads and images in which it gets more than 0.3 of all attention, per layer",
    "sinks.tokens.times_uniform": "attention received over an even share, per layer, mean over images and heads",
    "sinks.shares": "share of all attention that a kind of token gets, per layer, mean over images, heads and queries",
    "sinks.outlier_patches_times_uniform": f"attention received over an even share, last layer{_INTERVAL}",
    "sinks.normal_patches_times_uniform": f"attention received over an even share, last layer{_INTERVAL}",
    "sinks.writer.layer": "block, from 1, whose FFN does most for the largest value of the residual stream",
    "sinks.writer.channel": "index of the channel of that value",
    "sinks.writer.agreement": "share of images in which block, channel and kind of token are these",
    "sinks.writer.share": "what this FFN adds over that value, median over those images",
    "sinks.writer.images": "images looked at",
    "probes.normal.position_top1": f"share of patches put at their right position{_INTERVAL}",
    "probes.normal.position_distance": f"patches between predicted and right position{_INTERVAL}",
    "probes.normal.reconstruction_error": f"L2 over the pixels of a patch, RGB from 0 to 1{_INTERVAL}",
    "probes.outlier.position_top1": f"share of patches put at their right position{_INTERVAL}",
    "probes.outlier.position_distance": f"patches between predicted and right position{_INTERVAL}",
    "probes.outlier.reconstruction_error": f"L2 over the pixels of a patch, RGB from 0 to 1{_INTERVAL}",
    "classification.classes": "classes",
    "classification.chance": "share of test images in the most frequent class",
    **{
        f"classification.{kind}.{key}": unit
        for kind in ("CLS", "normal", "outlier", "normal, images with outliers", "register")
        for key, unit in {
            "accuracy": "share of test images classified right from one token, mean over draws of the token",
            "std": "standard deviation of the accuracy over draws",
            "accuracies": "accuracy of each draw",
            "train_images": "images",
            "test_images": "images",
            "images_without": "images without such a token, left out",
            "images_of_unknown_class": "test images whose class has no training image with such a token, left out",
        }.items()
    },
}


def unit_of(place: str) -> str | None:
    """Unit of a number by its place, such as `outliers.share.mean`; that of the nearest place above it."""
    while place and place not in UNITS:
        place = place.rpartition(".")[0]
    return UNITS.get(place)
