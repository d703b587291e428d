#!/usr/bin/env bash
# From nothing to a trained model: installs, makes token shards from the Python standard library's sources,
# trains a small Llama on 4 CPU ranks (tensor 2 x pipeline 2, ZeRO-1, BF16), and lets it write. Run again, it
# reuses what is there. Arguments go to launch/pretrain.py:
#
#   bash launch/quickstart.sh --train.steps 300

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

data=data/quickstart
sources="$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
texts=(--input "$sources" --suffix .py --exclude site-packages test tests)
mkdir -p "$data"
if [[ ! -f "$data/tokenizer.json" ]]; then
    python data_tools/train_tokenizer.py "${texts[@]}" --output "$data/tokenizer.json" --vocab-size 4096
fi
python data_tools/tokenize_text.py "${texts[@]}" --tokenizer "$data/tokenizer.json" --bad skip \
    --output "$data/train" --validation-output "$data/validation" --validation-share 0.05

unset CUDA_VISIBLE_DEVICES # breaks the deepspeed launcher on hosts without GPUs
deepspeed --num_gpus 4 launch/pretrain.py --config configs/run/quickstart.yaml "$@"
python launch/generate.py --run runs/quickstart --prompt "def main(" --max-new-tokens 60

echo "run folder:   runs/quickstart"
echo "TensorBoard:  $megatrain_venv/bin/tensorboard --logdir runs/quickstart/tensorboard"
echo "resume:       bash launch/quickstart.sh --train.steps 300"
