"""README's table of what reproduces: its claims, and the paper's figure as told there."""

# finding | chapter | claim | setting | the paper's figure
REPRODUCES = [
    ("TokFSM: state + digit triples", "01", "fsm.trigrams", "the paper's world and seed", "686"),
    (
        "A small GPT-NeoX learns the world: state accuracy",
        "01",
        "fsm.state_accuracy",
        "2 layers, d=64, half turn; paper 4 layers, d=128",
        "0.968",
    ),
    (
        "Sampled walks lose the beat: legal when read one digit late",
        "01",
        "fsm.off_beat",
        "standard rotary, short training; control: true walks",
        "not told",
    ),
    (
        "With codes at every head and MLP, k=1: state accuracy",
        "03",
        "states.state_accuracy",
        "1000 codes from data, no training; paper 10,000 codes, trained",
        "0.637",
    ),
    ("Dead codes", "03", "states.dead_share", "the same", "0.93 to 0.997"),
    (
        "A state's best code: precision",
        "03",
        "states.code_precision",
        "the same, held out",
        "0.971",
    ),
    (
        "The best neuron at the same recall: precision",
        "03",
        "states.neuron_precision",
        "512 hidden neurons, both signs; paper 128 a layer",
        "0.705",
    ),
    (
        "Writing a state's codes moves the model there (JSD, 1 = untouched)",
        "03",
        "states.jsd_all",
        "all codes, two positions",
        "near 0 (its figure)",
    ),
    (
        "The MLP layers' codes alone suffice (JSD, 1 = untouched)",
        "03",
        "states.jsd_mlp",
        "two layers",
        "near 0 (its figure): here only in part",
    ),
    (
        "The course's language model: loss, nats a token",
        "04",
        "stories.loss",
        "0.75M parameters, unseen stories; control: words in random order",
        "none",
    ),
    (
        "The lowest loss there is (entropy of the stories)",
        "04",
        "stories.entropy_floor",
        "known from the choices that made them; control: word frequencies alone",
        "none",
    ),
    (
        "It remembers a story's month",
        "04",
        "stories.month_persistence",
        "share of the months' probability; control: another story's beginning; chance 0.083",
        "none",
    ),
    (
        "It does not remember place, object, colour, number, relative",
        "04",
        "stories.forgotten_facts",
        "the same, mean of five; a finding about this model",
        "none",
    ),
    (
        "Who receives? Held-out pairs of names",
        "04",
        "stories.ioi_accuracy",
        "likeliest of all words; control: words in random order",
        "none",
    ),
    (
        "Four residual codes at every head and MLP: loss above the control, nats",
        "05",
        "finetune.loss_gap",
        "1024 codes a book; control: every code replaced by another",
        "not its form",
    ),
    (
        "One code at every head and MLP: loss above the control, share",
        "05",
        "finetune.gap_single",
        "2048 codes a book, nearest",
        "not told",
    ),
    (
        "The paper's selection, 8 best cosines: loss above the control, share",
        "05",
        "finetune.gap_top8",
        "1024 codes, heads and MLPs, short training; paper: attention alone, 10,000 codes",
        "0.06 to 0.14, attention alone",
    ),
    (
        "Who receives, in residual codes",
        "05",
        "finetune.ioi_accuracy",
        "held-out pairs; control: every code replaced by another",
        "none",
    ),
    (
        "Codes of the best cosines are near-duplicates (cosine of two at one place)",
        "05",
        "finetune.likeness_top8",
        "control: at different places",
        "not told",
    ),
    (
        "Codes against neurons at the same recall: precision gained",
        "06",
        "codes.precision_gain_over_neurons",
        "all codes, held out, mean over concepts; control: as many codes as neurons",
        "> 0.30, its patterns; no such control",
    ),
    (
        "The same, as many codes as neurons",
        "06",
        "codes.precision_gain_equal_pool",
        "codes drawn at random; control: the most used",
        "not told",
    ),
    (
        "Writing a month's codes makes the model name that month",
        "06",
        "codes.written_month",
        "share of the months' probability; control: the told month's own codes",
        "none",
    ),
    (
        "A sparse autoencoder's active features (L0)",
        "07",
        "sae.l0",
        "tied, 384 features, resid.1",
        "its choice",
    ),
    (
        "Variance that it leaves unexplained (FVU)",
        "07",
        "sae.fvu",
        "decoder refitted and tuned; control: as many random directions by matching pursuit",
        "not told for this size",
    ),
    (
        "Perplexity with decoded states / as it is",
        "07",
        "sae.perplexity_ratio",
        (
            "decoder tuned on the model's predictions; control: random directions, decoder tuned "
            "as long; paper: Pythia-70M, layer 2, tied"
        ),
        "1.6 (25 to 40)",
    ),
    (
        "Two seeds find the same features: mean cosine to the nearest",
        "07",
        "sae.seed_overlap",
        "192 features; control: random directions",
        "not told",
    ),
    (
        "Best single feature for a known concept, F1: tied autoencoder",
        "08",
        "baselines.concept_f1.sae_tied",
        "held out, mean over concepts; control: as many random directions",
        "none",
    ),
    (
        "The same: PCA",
        "08",
        "baselines.concept_f1.pca",
        "96 components; control: as many random directions",
        "none",
    ),
    (
        "The same: ICA",
        "08",
        "baselines.concept_f1.ica",
        "96 components; control: as many random directions",
        "none",
    ),
    (
        "The same: hidden neurons",
        "08",
        "baselines.concept_f1.neurons",
        "384 neurons of the same block; control: as many random directions",
        "none",
    ),
    (
        (
            "A feature that detects the coming class of word also carries it: nats lost when held "
            "still"
        ),
        "08",
        "baselines.detector_held",
        "mean of 15 classes; control: as much taken away in a random direction",
        "none",
    ),
    (
        "How well a machine's explanations predict features, r: tied autoencoder",
        "09",
        "autointerp.score.sae_tied.layer1",
        "predicate explainer, top and random fragments; control: random directions",
        "its Fig. 2: highest, no language model here",
    ),
    (
        "The same: ICA, cut off at zero",
        "09",
        "autointerp.score.ica_relu.layer1",
        "the same",
        "its Fig. 2: second (signed)",
    ),
    (
        "The same: ICA as it is",
        "09",
        "autointerp.score.ica.layer1",
        "the same",
        "its Fig. 2: second",
    ),
    (
        "The same: PCA as it is",
        "09",
        "autointerp.score.pca.layer1",
        "the same",
        "its Fig. 2: third",
    ),
    (
        "The same: random directions, cut off at zero",
        "09",
        "autointerp.score.random.layer1",
        "the same",
        "its Fig. 2: last, with the basis",
    ),
    (
        "Does the score agree with the truth? Rank correlation with the F1 of the best concept",
        "09",
        "autointerp.agreement_with_truth",
        (
            "over an autoencoder's features, without predicates that coincide with concepts; "
            "control: shuffled"
        ),
        "nobody could ask",
    ),
    (
        "The same, when the truth knows every word as well",
        "09",
        "autointerp.agreement_with_truth_and_words",
        "the same",
        "nobody could ask",
    ),
    (
        (
            "One code of the first MLP, written at the receiver's name, gives the gift to somebody"
            " else"
        ),
        "10",
        "ioi.one_code",
        "share of 40 prompts, one code at every head and MLP; control: a random code there",
        "none",
    ),
    (
        "KL to the counterfactual with 5 features patched, fixed names: tied autoencoder",
        "10",
        "ioi.kl_at_5.sae_tied.fixed",
        "one set for all prompts, nats; control: random directions",
        "its Fig. 3: falls fastest",
    ),
    ("The same: PCA", "10", "ioi.kl_at_5.pca.fixed", "the same", "its Fig. 3: slower"),
    (
        "The same: an autoencoder without penalty",
        "10",
        "ioi.kl_at_5.sae_alpha0.fixed",
        "the same",
        "its Fig. 3: slower",
    ),
    (
        "The same: ICA",
        "10",
        "ioi.kl_at_5.ica.fixed",
        "the same",
        "not asked: here as good as autoencoders",
    ),
    (
        (
            "A low error is no low floor: KL left with all features of the tied autoencoder "
            "patched, last layer"
        ),
        "10",
        "ioi.floor_last_layer",
        "random names, nats; control: TopK autoencoder",
        "not asked",
    ),
    (
        "Length of the edit that takes away 90 % of KL, random names: tied autoencoder",
        "10",
        "ioi.edit_at_90pct.sae_tied.per_prompt",
        "a set for each prompt; of the whole difference",
        "its Fig. 3: less than PCA; here as much",
    ),
    ("The same: PCA", "10", "ioi.edit_at_90pct.pca.per_prompt", "the same", "its Fig. 3: more"),
    (
        (
            "Features that the last layer's best ) feature rests on, ablated: share of the right "
            ")'s probability lost"
        ),
        "11",
        "circuits.tree_effect",
        "held-out places; control: as many others, edits as long",
        "shown without a control",
    ),
    (
        "The same: that feature itself",
        "11",
        "circuits.root_alone",
        "control: the features below it",
        "not asked",
    ),
    (
        "The same, by codes of the first MLP",
        "11",
        "circuits.code_tree_effect",
        "one code at every head and MLP; control: as many others",
        "none",
    ),
    (
        (
            "A code of (, written in the first MLP where nobody opens a parenthesis: probability "
            "of a closing one"
        ),
        "11",
        "circuits.written_parenthesis",
        "largest within six words; control: random codes",
        "none",
    ),
    (
        "The strongest child is the feature with the most similar direction",
        "11",
        "circuits.nearest_is_strongest",
        "share of the parents of three trees",
        "not asked",
    ),
    (
        (
            "Stories about the topic asked for, within 1.5 x the unsteered loss: codes, written "
            "where the topic is chosen"
        ),
        "12",
        "steering.topic_rate_at_budget.codebook",
        "ten topics, held-out words; control: random codes there",
        "its Table 3: 65 to 100 % (mentions, no price given)",
    ),
    (
        (
            "The same: the paper's way, codes forced everywhere, the cheapest setting (over the "
            "budget)"
        ),
        "12",
        "steering.topic_rate_at_budget.codebook_forced",
        "the same, one code a state; control: unsteered",
        "its Table 3",
    ),
    (
        (
            "Eight of the codes of a model with eight a state, forced everywhere: stories that "
            "mention the topic"
        ),
        "12",
        "steering.forced_mentions",
        "at several times the unsteered loss; control: eight random codes",
        "its Table 3: 65 to 100 %",
    ),
    (
        "The same within the budget: features of an autoencoder, where the topic is chosen",
        "12",
        "steering.topic_rate_at_budget.sae_tied",
        "control: as long edits in random directions there",
        "not asked",
    ),
    (
        "The same: a mean-difference vector, everywhere",
        "12",
        "steering.topic_rate_at_budget.mean_difference",
        "control: unsteered",
        "not asked",
    ),
    (
        "The same: that vector, where the features say",
        "12",
        "steering.topic_rate_at_budget.mean_difference_at_places",
        "control: edits in random directions there",
        "not asked",
    ),
    (
        "The same: that vector, where the model would say a topic word (no features)",
        "12",
        "steering.topic_rate_at_budget.mean_difference_at_words",
        "control: unsteered",
        "not asked",
    ),
    (
        "Known concepts by the best single feature, F1: tied autoencoder",
        "13",
        "scoreboard.concept_f1.sae_tied",
        "384 features behind block 1; control: random directions",
        "not known there",
    ),
    (
        "The same: codes of a network finetuned with them there",
        "13",
        "scoreboard.concept_f1.codebook_tuned",
        "the same",
        "not known there",
    ),
    (
        "The same: ICA",
        "13",
        "scoreboard.concept_f1.ica",
        "the same, 96 components",
        "not known there",
    ),
    (
        "Steering at the last block, within 1.5 x the unsteered loss: ICA",
        "13",
        "scoreboard.steered.ica",
        "the same switch for every dictionary; control: random directions",
        "not asked",
    ),
    (
        "The machine's hundred states by the best single feature, F1: one code (k-means)",
        "13",
        "scoreboard.fsm_f1.kmeans",
        "512 features of the last MLP; control: random directions",
        "its Section 4: precision alone",
    ),
    ("The same: TopK autoencoder", "13", "scoreboard.fsm_f1.sae_topk", "the same", "not asked"),
    (
        "The states of one machine, F1: one code (k-means)",
        "13",
        "scoreboard.one_code_one_machine",
        "128 codes; control: as many random directions",
        "not asked",
    ),
    (
        "The same, three machines walking at once, their states added up",
        "13",
        "scoreboard.one_code_three_machines",
        "the same",
        "not asked",
    ),
    (
        "The same: ICA",
        "13",
        "scoreboard.ica_three_machines",
        "64 components; control: 512 random directions",
        "not asked",
    ),
    (
        "Features of two seeds, partnered one to one: mean cosine, TopK autoencoder",
        "13",
        "scoreboard.stability.sae_topk",
        "control: as many raw states drawn at random",
        "asked for by its reviewers",
    ),
    (
        (
            "Codes looked up at every head and MLP of the course's model: time added, as a "
            "multiple of its own"
        ),
        "14",
        "scale.codebook_overhead",
        "2048 codes at six sites, one CPU core",
        "asked for by its reviewers",
    ),
    (
        "Seconds of sizes never timed, predicted from three prices: median absolute log ratio",
        "14",
        "scale.prediction_error",
        "up to 768 wide and 10,000 codes; control: FLOPs alone",
        "none",
    ),
    (
        (
            "Memory of a training step, counted without running it: median absolute log ratio to "
            "the measured"
        ),
        "14",
        "scale.memory_error",
        "nine small models on a CPU; control: all but activations",
        "none",
    ),
    (
        "Precision of trusted features on changed text: tied autoencoder",
        "14",
        "scale.shift_precision",
        "mean of five changes; control: random directions chosen alike",
        "asked for by its reviewers",
    ),
    (
        "Features of two seeds and texts, partnered one to one: mean cosine, codes from data",
        "14",
        "scale.seed_stability.codebook",
        "eleven codes a state; control: raw states drawn at random",
        "asked for by its reviewers",
    ),
    (
        "Writing another sentence's codes at the heads makes the model name its receiver",
        "05",
        "finetune.written_receiver",
        "control: codes of the same sentence with another giver",
        "none",
    ),
]

# what README shows at first sight; the rest is folded away
HEADLINES = {
    "states.state_accuracy",
    "states.jsd_all",
    "states.jsd_mlp",
    "finetune.gap_single",
    "codes.precision_gain_over_neurons",
    "codes.precision_gain_equal_pool",
    "sae.perplexity_ratio",
    "ioi.kl_at_5.sae_tied.fixed",
    "ioi.kl_at_5.pca.fixed",
    "autointerp.agreement_with_truth",
    "steering.topic_rate_at_budget.codebook",
    "steering.topic_rate_at_budget.codebook_forced",
    "scoreboard.one_code_one_machine",
    "scoreboard.one_code_three_machines",
}
