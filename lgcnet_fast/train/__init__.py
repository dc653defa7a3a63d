"""The stages of a run: search, derive, pretrain, finetune, evaluate, predict."""
