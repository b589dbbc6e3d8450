#!/usr/bin/env bash
# One build on all GPUs of a Ray cluster whose nodes share a folder. From any machine that reaches the cluster's dashboard:
#
#     RAY_API_SERVER_ADDRESS=http://HEAD:8265 SOURCE=/data/train OUT=/data/labels TEACHER=timm:… bash examples/ray_job.sh
#
# `ray job stop` ends it within the 2 seconds of --grace; run this again to resume. Ray's dashboard shows the actors and their shards.
set -euo pipefail

ray job submit -- \
    ferkd-data build "${SOURCE:?}" "${OUT:?}" --teacher "${TEACHER:?}" --crops 200 --engine ray --grace 2
