#!/bin/sh
# What parts of the recipe medvlm_tiny are worth on val, by a tenth of its steps: sh benchmarks/tiny_ablation.sh DATA REAL OUT VARIANT...
# DATA as the recipe wants it, REAL the real sets alone, as folders with manifests. A variant is the recipe with these --set: see below.
# Tables lie in OUT/VARIANT/*/table.md and OUT/VARIANT/checks/scores.md.
set -e
data=$1 real=$2 out=$3
shift 3
short="--set stages.glance.steps=500 --set stages.see.steps=200 --set stages.look.steps=0 --set stages.speak.steps=80 --set stages.match.steps=10"
without() { for name in "$@"; do printf -- "--set stages.*.data.phantom_%s=0 " "$name"; done; }
set -f  # the stars are the recipe's
for variant in "$@"; do
    case $variant in
        whole) changed="" ;;
        no-made-data) changed=$(without films chest_ct abdomen_ct head_ct abdomen_mr head_mr fundus) ;;
        no-halved) changed="--set stages.glance.steps=0 --set stages.see.steps=420" ;;  # about as long
        *) echo "no variant $variant; whole, no-made-data, no-halved" >&2; exit 2 ;;
    esac
    # shellcheck disable=SC2086
    medvlm train medvlm_tiny --data "$data" --out "$out/$variant/run" $short $changed
    score() { medvlm evaluate "$2" --data "$real/$3" --model "$out/$variant/run/model" --split val --out "$out/$variant/$1"; }
    score lungs segment xray_covid
    score vessels segment fundus_chase
    score nuclei segment path_dsb_nuclei
    score cells ground path_bccd
    python "$(dirname "$0")/tiny_checks.py" --data "$real" --model "$out/$variant/run/model" --split val --out "$out/$variant/checks" --only kind parts mirror
done
