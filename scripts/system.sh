#!/bin/sh
# Install from Debian's packages (or Ubuntu's) what the tests need besides Python, where it is missing: a browser, two
# proxies, the check of systemd's units, rsync, two editors and a sandbox. Nothing that is installed is upgraded, and no service is started or enabled.
set -eu

missing=
need() {  # PROGRAM PACKAGE
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need chromium chromium
need nginx nginx
need caddy caddy
need systemd-analyze systemd
need rsync rsync
need vim vim
need ed ed
need bwrap bubblewrap
missing=${missing# }
[ -n "$missing" ] || exit 0

give_up() {
    echo "Missing: $missing. $1" >&2
    exit 1
}
command -v apt-get >/dev/null 2>&1 || give_up 'There is no apt-get here: install them as your system does, then run this again.'
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null 2>&1 || give_up 'Run this as root, or install sudo.'
    exec sudo -- "$0"
fi

# Debian's packages start what they install. The policy keeps them from it; where there is one already, it is not ours to change.
policy=/usr/sbin/policy-rc.d
log=$(mktemp)
trap 'rm -f "$log" ${own_policy:+"$own_policy"}' EXIT
trap 'exit 1' HUP INT TERM
if [ ! -e "$policy" ]; then
    own_policy=$policy
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >"$log" 2>&1 || {
        cat "$log" >&2
        give_up "apt-get $1 failed, see above."
    }
}
echo "Installing $missing"
apt update
# shellcheck disable=SC2086 # one word a package
apt install --yes --no-install-recommends $missing

for service in nginx caddy; do  # nor at the next start of the machine, where it was not there before
    case " $missing " in
        *" $service "*) if command -v systemctl >/dev/null 2>&1; then systemctl --quiet disable "$service" 2>"$log" || cat "$log" >&2; fi ;;
    esac
done
