#!/bin/bash
# Written by 'dreamscale submit ray'. The cluster's machines have Dreamscale installed and see the same paths.
set -euo pipefail
ray job submit --address @ADDRESS@ --submission-id @NAME@-$(date +%s) --no-wait@RESOURCES@ -- \
  @SHELL@
