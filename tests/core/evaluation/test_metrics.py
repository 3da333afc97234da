from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_curve

from cifake_ray.core.evaluation import metrics as module
from cifake_ray.core.evaluation.calibration import calibrate, compute_p_fake
from cifake_ray.core.evaluation.metrics import compute_metrics

INTERVALS = (
    "auroc",
    "average_precision",
    "eer",
    *module.RATES,
    "brier",
    "ece",
    "ece_uncalibrated",
    "nll",
)


def make_scores(num: int, seed: int = 0, separation: float = 2.0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num)
    logit = rng.normal((2 * label - 1) * separation, 1.7).astype(np.float32)
    return logit, label


def measure(logit, label, **options):
    options = {"temperature": 1.0, "threshold": 0.5, "num_bootstrap": 0} | options
    return compute_metrics(np.asarray(logit, np.float32), np.asarray(label), **options)


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half():
    logit, label = make_scores(300)
    logit = np.round(logit)  # many ties
    real, fake = logit[label == 0], logit[label == 1]
    pairs = (fake[:, None] > real).mean() + (fake[:, None] == real).mean() / 2
    assert measure(logit, label)["auroc"]["value"] == pytest.approx(pairs)


@pytest.mark.parametrize("decimals", [0, 1, 8])
@pytest.mark.parametrize("num", [60, 1500, 5000])
def test_thresholds_keep_their_false_positive_rate_where_they_were_set(num, decimals):
    logit, label = make_scores(num, seed=num)
    logit = np.round(logit, decimals)
    calibration = calibrate(logit, label)
    p_fake = compute_p_fake(logit, calibration.temperature)
    real = p_fake[label == 0]
    cuts = ((0.01, calibration.threshold_fpr_1), (0.001, calibration.threshold_fpr_01))
    for rate, threshold in cuts:
        assert 0 <= threshold <= 1
        assert np.float32(threshold) == threshold  # exact in float32: every reader agrees
        assert np.mean(real >= threshold) <= rate
        # The next lower threshold that decides otherwise lets too many through.
        assert np.mean(real >= p_fake[p_fake < threshold].max()) > rate


def test_default_threshold_has_the_best_balanced_accuracy():
    logit, label = make_scores(500)
    calibration = calibrate(logit, label)
    p_fake = compute_p_fake(logit, calibration.temperature)

    def balanced_accuracy(threshold):
        hit = (p_fake >= threshold) == label
        return (hit[label == 0].mean() + hit[label == 1].mean()) / 2

    best = max(balanced_accuracy(threshold) for threshold in p_fake)
    assert balanced_accuracy(calibration.threshold) == pytest.approx(best)


def test_tied_thresholds_go_to_the_one_nearest_half():
    logit = np.array([-4.0, -1.0, 1.0, 4.0], np.float32)
    # Between -4 and -1 and between 1 and 4 balanced accuracy is equal, and equally far from 0.5.
    calibration = calibrate(logit, np.array([0, 1, 0, 1]))
    p_fake = compute_p_fake(logit, calibration.temperature)
    assert p_fake[2] < calibration.threshold < p_fake[3]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_is_recovered(temperature):
    rng = np.random.default_rng(1)
    true_logit = rng.normal(0, 2.5, 40_000)
    label = (rng.random(40_000) < expit(true_logit)).astype(np.int64)
    found = calibrate((true_logit * temperature).astype(np.float32), label).temperature
    assert found == pytest.approx(temperature, rel=0.05)


def test_separable_scores_do_not_collapse_to_zero_and_one():
    label = np.repeat([0, 1], 50)
    logit = (np.linspace(1, 3, 100) * (2 * label - 1)).astype(np.float32)
    calibration = calibrate(logit, label)
    p_fake = compute_p_fake(logit, calibration.temperature)
    assert calibration.temperature > 0.1
    assert p_fake.max() < 1
    assert calibration.threshold == pytest.approx(0.5, abs=0.2)


def draw_outlier():
    """500 REAL and 500 FAKE that are told apart well, and a REAL image with a logit of 25."""
    rng = np.random.default_rng(0)
    logit = np.concatenate([rng.normal(-8, 1.5, 500), [25], rng.normal(8, 1.5, 500)])
    return logit.astype(np.float32), np.repeat([0, 1], [501, 500])


def test_a_rate_that_no_threshold_keeps_is_none_and_the_others_are_kept():
    logit, label = draw_outlier()
    calibration = calibrate(logit, label)
    p_fake = compute_p_fake(logit, calibration.temperature)
    assert p_fake[500] == 1
    assert calibration.threshold_fpr_01 is None
    assert np.mean(p_fake[:501] >= calibration.threshold_fpr_1) <= 0.01
    assert np.mean((p_fake >= calibration.threshold) == label) > 0.99


HUGE = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("logit", "label"),
    [
        (np.full(40, 3.0), np.repeat([0, 1], 20)),
        (np.zeros(40), np.repeat([0, 1], 20)),
        (np.linspace(-3, 3, 40), np.zeros(40, int)),
        (np.linspace(-3, 3, 40), np.ones(40, int)),
        (np.repeat([HUGE, -HUGE], 20), np.repeat([0, 1], 20)),
        (np.repeat([-HUGE, HUGE], 20), np.repeat([0, 1], 20)),
        (np.tile([-HUGE, HUGE], 20), np.repeat([0, 1], 20)),
        (np.array([HUGE]), np.array([0])),
        draw_outlier(),
    ],
)
def test_whatever_scores_a_training_ends_with_it_gets_its_numbers(logit, label):
    logit = logit.astype(np.float32)
    calibration = calibrate(logit, label)
    assert 0 < calibration.temperature < np.inf
    assert 0 <= calibration.threshold <= 1
    p_fake = compute_p_fake(logit, calibration.temperature)
    for rate, cut in ((0.01, calibration.threshold_fpr_1), (0.001, calibration.threshold_fpr_01)):
        assert cut is None or np.mean(p_fake[label == 0] >= cut) <= rate
    values = {"temperature": calibration.temperature, "threshold": calibration.threshold}
    json.dumps(measure(logit, label, **values, num_bootstrap=10), allow_nan=False)


def test_p_fake_ties_at_one_from_a_logit_of_about_seventeen():
    p_fake = compute_p_fake(np.array([15.0, 18.0, 90.0]), 1.0)
    assert p_fake.dtype == np.float32
    assert p_fake[0] < 1
    assert (p_fake[1:] == 1).all()
    # Ranking is by logit, so saturated scores are still told apart.
    assert measure([18, 90], [0, 1])["auroc"]["value"] == 1


@pytest.mark.parametrize(
    ("logit", "label", "message"),
    [
        ([], [], "no image"),
        ([1.0, np.nan], [0, 1], "1 of 2 logits are NaN"),
        ([1.0, np.inf], [0, 1], "infinite"),
        ([1.0, 2.0], [0, 2], "labels are 0"),
        ([1.0], [0, 1], r"\[N\]"),
    ],
)
def test_unusable_input_is_refused(logit, label, message):
    arrays = np.array(logit, np.float32), np.array(label, np.int64)
    with pytest.raises(ValueError, match=message):
        calibrate(*arrays)
    with pytest.raises(ValueError, match=message):
        measure(*arrays)


def test_ece_brier_and_nll_by_hand():
    share = np.array([0.9, 0.9, 0.2, 0.2])
    result = measure(np.log(share / (1 - share)), [1, 0, 0, 0])
    # Bin of 0.9: two images, half FAKE, gap 0.4. Bin of 0.2: two images, no FAKE, gap 0.2.
    assert result["ece"]["value"] == pytest.approx((2 * 0.4 + 2 * 0.2) / 4, abs=1e-6)
    assert result["brier"]["value"] == pytest.approx((0.01 + 0.81 + 0.04 + 0.04) / 4, abs=1e-6)
    nll = -np.log([0.9, 0.1, 0.8, 0.8]).mean()
    assert result["nll"]["value"] == pytest.approx(nll, abs=1e-6)
    filled = [b for b in result["reliability_bins"] if b["count"]]
    assert [b["count"] for b in filled] == [2, 2]
    assert [b["fake_fraction"] for b in filled] == [0, 0.5]
    assert result["ece_uncalibrated"] == result["ece"], "at temperature 1"
    assert result["reliability_bins_uncalibrated"] == result["reliability_bins"]


def test_reliability_before_the_temperature_is_that_of_temperature_one():
    scores = make_scores(500)
    plain, calibrated = measure(*scores), measure(*scores, temperature=1.7)
    assert calibrated["ece_uncalibrated"] == plain["ece"] != calibrated["ece"]
    assert calibrated["reliability_bins_uncalibrated"] == plain["reliability_bins"]


def test_a_temperature_mends_overconfident_scores():
    rng = np.random.default_rng(1)
    true_logit = rng.normal(0, 2, 20_000)
    label = (rng.random(20_000) < expit(true_logit)).astype(np.int64)
    result = measure(4 * true_logit, label, temperature=4.0, num_bootstrap=100)
    assert result["ece"]["high"] < 0.02
    assert result["ece_uncalibrated"]["low"] > 0.1


def test_eer_and_tpr_by_hand():
    # 10 REAL, 10 FAKE; 2 of each on the wrong side: at the cut between, FPR = FNR = 20%.
    logit = np.concatenate([np.arange(-10, -2), [5, 6], np.arange(7, 15), [-1, -2]])
    result = measure(logit, np.repeat([0, 1], 10))
    assert result["eer"]["value"] == pytest.approx(0.2)
    assert module.find_tpr(logit, np.repeat([0, 1], 10), 0.01) == pytest.approx(0.8)
    assert result["at_0.5"]["confusion"] == [[8, 2], [2, 8]]


@pytest.mark.parametrize("only", [0, 1])
def test_a_single_class_gives_none_where_undefined(only):
    logit, _ = make_scores(40)
    result = measure(logit, np.full(40, only), num_bootstrap=20)
    for name in ("auroc", "average_precision", "eer", *module.RATES):
        reason = f"there are no {('FAKE', 'REAL')[only]} images"
        assert result[name] == {"value": None, "low": None, "high": None, "reason": reason}
    assert result["roc_points"] is None
    assert result["at_0.5"]["balanced_accuracy"]["value"] is None
    assert result["at_0.5"]["per_class"][("FAKE", "REAL")[only]]["recall"] is None
    assert result["brier"]["low"] <= result["brier"]["value"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("num_real", "num_fake", "reasons"),
    [
        (5000, 5, {}),
        (4999, 5, {"tpr_at_fpr_0.1pct": "needs 5,000 REAL images, there are 4,999"}),
        (
            499,
            90,
            {
                "tpr_at_fpr_1pct": "needs 500 REAL images, there are 499",
                "tpr_at_fpr_0.1pct": "needs 5,000 REAL images, there are 499",
            },
        ),
        (
            9000,
            4,
            dict.fromkeys(module.RATES, "needs 5 FAKE images, there are 4"),
        ),
    ],
)
def test_an_operating_point_that_rests_on_too_few_images_is_no_number(num_real, num_fake, reasons):
    label = np.repeat([0, 1], [num_real, num_fake])
    result = measure(np.arange(len(label)), label, num_bootstrap=10)
    for name in ("auroc", *module.RATES):
        assert result[name].get("reason") == reasons.get(name), name
        assert (result[name]["value"] is None) == (name in reasons), name
        assert (result[name]["low"] is None) == (name in reasons), name


def test_given_scores_replace_those_of_the_logits():
    logit, label = make_scores(300)
    given = np.where(logit > 1, 0.75, 0.25).astype(np.float32)
    result = measure(logit, label, p_fake=given, num_bootstrap=20)
    assert result["accuracy"]["value"] == np.mean((logit > 1) == label)
    assert result["brier"]["value"] == pytest.approx(np.mean((given - label) ** 2))
    assert result["auroc"] == measure(logit, label, num_bootstrap=20)["auroc"]


def test_one_image_is_enough():
    json.dumps(measure([0.3], [1], num_bootstrap=10), allow_nan=False)


def test_intervals_hold_the_value_and_shrink_with_more_images():
    small, large = (measure(*make_scores(num, seed=3), num_bootstrap=200) for num in (1200, 60_000))
    for name in {"accuracy", *INTERVALS} - {"tpr_at_fpr_0.1pct"}:  # the small one has none
        for result in (small, large):
            assert result[name]["low"] <= result[name]["value"] <= result[name]["high"]
        width = [result[name]["high"] - result[name]["low"] for result in (small, large)]
        assert width[1] < width[0] / 2, name
    # Wilson's interval by hand for 1 of 1 and the centre of 50%.
    assert module.wilson_interval(1, 1)["low"] == pytest.approx(1 / (1 + module.Z_95**2))
    half = module.wilson_interval(50, 100)
    assert (half["low"] + half["high"]) / 2 == pytest.approx(0.5)


def test_auroc_interval_matches_the_spread_of_fresh_samples():
    result = measure(*make_scores(2000, separation=1.0), num_bootstrap=400)["auroc"]
    fresh = [
        measure(*make_scores(2000, seed, separation=1.0))["auroc"]["value"] for seed in range(100)
    ]
    low, high = np.percentile(fresh, (2.5, 97.5))
    assert result["high"] - result["low"] == pytest.approx(high - low, rel=0.25)


@pytest.mark.parametrize("decimals", [1, 8])
def test_a_replicate_of_the_images_themselves_gives_the_numbers_of_scikit_learn(decimals):
    logit, label = make_scores(3000)
    logit = np.round(logit, decimals)
    p_fake = compute_p_fake(logit, 1.3)
    cells = module._Cells(logit, label, 1.3, p_fake)
    assert cells.measure(cells.counts) == pytest.approx(module._measure(logit, label, 1.3, p_fake))


def find_eer(logit, label):
    fpr, tpr, _ = roc_curve(label, logit, drop_intermediate=False)
    return np.interp(0.0, fpr + tpr - 1, fpr)


@pytest.mark.parametrize(("tied", "value"), [(True, 0.5), (False, 0.4375)])
def test_the_interval_of_the_equal_error_rate_holds_with_ties(tied, value):
    label = np.repeat([0, 1], 50)
    logit = np.repeat([8.0, -8.0, 8.0, -8.0], [35, 15, 45, 5]).astype(np.float32)
    logit = np.ones_like(logit) if tied else logit
    rng = np.random.default_rng(0)
    picks = [np.append(rng.choice(50, 50), rng.choice(50, 50) + 50) for _ in range(1000)]
    low, high = np.percentile([find_eer(logit[pick], label[pick]) for pick in picks], (2.5, 97.5))
    eer = measure(logit, label, num_bootstrap=1000)["eer"]
    assert eer["value"] == pytest.approx(value)
    assert (eer["low"], eer["high"]) == pytest.approx((low, high), abs=0.005)


def test_cells_of_many_images_cost_little_accuracy():
    logit, label = make_scores(60_000)
    p_fake = compute_p_fake(logit, 1.3)
    cells = module._Cells(logit, label, 1.3, p_fake)
    assert cells.counts.shape[1] <= module.MAX_BOOTSTRAP_CELLS
    assert cells.measure(cells.counts) == pytest.approx(
        module._measure(logit, label, 1.3, p_fake), abs=1e-3
    )


def test_order_of_the_images_does_not_matter():
    logit, label = make_scores(700)
    order = np.random.default_rng(4).permutation(700)
    one = measure(logit, label, num_bootstrap=50)
    other = measure(logit[order], label[order], num_bootstrap=50)
    for name in ("accuracy", *INTERVALS):
        assert one[name] == pytest.approx(other[name])
    assert one["at_0.5"] == other["at_0.5"]
    assert one["roc_points"] == other["roc_points"]


def test_the_seed_decides_the_intervals():
    scores = make_scores(200)
    first, again, other = (measure(*scores, num_bootstrap=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["auroc"] != other["auroc"]


def test_roc_is_thinned_and_keeps_the_low_end():
    logit, label = make_scores(30_000, separation=0.8)
    result = measure(logit, label)
    fpr, tpr = (np.array(result["roc_points"][name]) for name in ("fpr", "tpr"))
    assert 200 < len(fpr) <= module.MAX_ROC_POINTS
    assert (fpr[0], fpr[-1], tpr[-1]) == (0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert np.sum(fpr < 0.01) > 50
    area = np.trapezoid(tpr, fpr)
    assert area == pytest.approx(result["auroc"]["value"], abs=2e-3)


def test_counts_add_up():
    logit, label = make_scores(1000)
    result = measure(logit, label, threshold=0.7)
    assert result["num_real"] + result["num_fake"] == result["num_images"] == 1000
    histogram = result["score_histogram"]
    assert sum(histogram["REAL"]) == result["num_real"]
    assert sum(histogram["FAKE"]) == result["num_fake"]
    assert sum(b["count"] for b in result["reliability_bins"]) == 1000
    assert np.sum(result["at_threshold"]["confusion"]) == 1000
    assert result["accuracy"] == result["at_0.5"]["accuracy"]
