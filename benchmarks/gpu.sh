#!/usr/bin/env bash
# All figures with a GPU, within 8 minutes, into a folder: time and memory of pruning steps, time of training steps.
#   benchmarks/gpu.sh [FOLDER]            default: docs/results/gpu
#   DEVICE=cpu benchmarks/gpu.sh /tmp/try # try the script itself on small models, without a GPU
# PyTorch's functions are told how many entries to prune. The device's name is in every row of the CSV files. What is cut
# off for lack of time is missing there, and the script says so in the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-docs/results/gpu}
device=${DEVICE:-cuda}
python=${PYTHON:-python}
mkdir -p "$folder"
steps=(resnet50 vit_base_patch16_224 vit_large_patch16_224)
small=(resnet18 vit_tiny_patch16_224)
large=(resnet50 vit_base_patch16_224)
turns=40
if [ "$device" = cpu ]; then
  steps=(resnet18) small=(tiny) large=(tiny) turns=2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cut=0
run() {  # seconds, name of the log, command
  local limit=$1 log=$folder/$2.txt
  shift 2
  printf '%s (%d s so far)\n' "$*" "$SECONDS"
  timeout --kill-after=10s "$limit" "$python" "$@" > "$log" 2>&1 || { cut=1; echo "failed or cut off: $log"; tail -n 3 "$log"; }
}

# kernels are compiled once and kept on disk; without this the first figures would hold seconds of it
run 90 warm benchmarks/speed.py --models resnet18 --contestants torch_sap --rounds 1 --device "$device"
for model in "${steps[@]}"; do
  run 70 "speed_$model" benchmarks/speed.py --models "$model" --contestants torch_sap torch --rounds 7 --device "$device" \
    --out "$folder/speed_$model"
done
run 50 overhead_small benchmarks/overhead.py --models "${small[@]}" --turns "$turns" --device "$device" \
  --out "$folder/overhead_small"
run 60 overhead_large benchmarks/overhead.py --models "${large[@]}" --turns "$turns" --device "$device" \
  --out "$folder/overhead_large"
run 40 overhead_amp benchmarks/overhead.py --models "${large[0]}" --amp --turns "$turns" --device "$device" \
  --out "$folder/overhead_amp"
echo "done in $SECONDS s: $folder"
exit "$cut"
