#!/bin/sh
# Everything one can know about the policy before any host enforces it. Needs no privilege and no network.
set -eu
cd "$(dirname "$0")"

echo '$ retinue policy check shop.yaml'
retinue policy check shop.yaml

echo; echo '$ retinue policy test shop.yaml -i inventory.yaml'
retinue policy test shop.yaml -i inventory.yaml

echo; echo '$ retinue policy matrix -p shop.yaml -i inventory.yaml'
retinue policy matrix -p shop.yaml -i inventory.yaml

echo; echo '$ retinue policy explain shop/web shop/api 8080 ...'
retinue policy explain shop/web shop/api 8080 -p shop.yaml -i inventory.yaml

echo; echo '$ retinue policy explain batch shop/db 5432 ...'
retinue policy explain batch shop/db 5432 -p shop.yaml -i inventory.yaml

echo; echo '$ retinue policy explain dev/web shop/api 8080 ...     (a guardrail, and no rule can lift it)'
retinue policy explain dev/web shop/api 8080 -p shop.yaml -i inventory.yaml

echo; echo '$ retinue policy blast-radius shop/web ...'
retinue policy blast-radius shop/web -p shop.yaml -i inventory.yaml
