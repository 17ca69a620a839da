#!/bin/sh
# The figures of medvlm-tiny's card: sh benchmarks/tiny_card.sh DATA OUT [MODEL] [SPLIT]
# DATA holds the real data sets, as folders with manifests; tables lie in OUT/*/table.md, OUT/checks/scores.md, paired differences to
# answers that see no image in OUT/*/compare.md.
set -e
data=$1 out=$2 model=${3:-medvlm-tiny} split=${4:-test}
run() { name=$1 task=$2 set=$3 with=$4; shift 4; medvlm evaluate "$task" --data "$data/$set" --model "$with" --split "$split" --out "$out/$name" "$@"; }
score() { name=$1 task=$2 set=$3; shift 3; run "$name" "$task" "$set" "$model" "$@"; }
beside() { run "$1-$4" "$2" "$3" "$5"; medvlm compare "$out/$1" "$out/$1-$4" > "$out/$1-$4/compare.md"; }
score lungs segment xray_covid
score vessels segment fundus_chase
score nuclei segment path_dsb_nuclei
if [ "$split" = test ]; then score organs segment dicom_series; fi
score cells ground path_bccd
score questions vqa vqa_rad --no-image
score films vqa xray_covid --no-image
score probes balanced_probe . --no-image
for what in "questions vqa vqa_rad" "films vqa xray_covid" "probes balanced_probe ."; do
    beside $what prior blind:prior
    beside $what blind "blind:$model"
done
score captions retrieve_facts .
python "$(dirname "$0")/tiny_checks.py" --data "$data" --model "$model" --split "$split" --out "$out/checks"
