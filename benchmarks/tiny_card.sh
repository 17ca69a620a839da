#!/bin/sh
# The figures of medvlm-tiny's card: sh benchmarks/tiny_card.sh DATA OUT [MODEL] [SPLIT]
# DATA holds the real data sets, as folders with manifests; tables lie in OUT/*/table.md, OUT/checks/scores.md.
set -e
data=$1 out=$2 model=${3:-medvlm-tiny} split=${4:-test}
score() { name=$1 task=$2 set=$3; shift 3; medvlm evaluate "$task" --data "$data/$set" --model "$model" --split "$split" --out "$out/$name" "$@"; }
score lungs segment xray_covid
score vessels segment fundus_chase
score nuclei segment path_dsb_nuclei
score organs segment dicom_series
score cells ground path_bccd
score questions vqa vqa_rad --no-image
score probes balanced_probe . --no-image
score captions retrieve_facts .
python "$(dirname "$0")/tiny_checks.py" --data "$data" --model "$model" --split "$split" --out "$out/checks"
