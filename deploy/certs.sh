#!/bin/sh
# A private certification authority for TLS between a service and its clients, with nothing but openssl:
#
#   deploy/certs.sh ca DIR                     DIR/ca.pem, DIR/ca-key.pem
#   deploy/certs.sh server DIR NAME SAN...     DIR/NAME/{ca,cert,key}.pem: a service that is reached under these names
#   deploy/certs.sh client DIR NAME SAN...     DIR/NAME/{ca,cert,key}.pem: somebody, whom rules call by these names
#
# A SAN is alice@example.org, ci.example.org, 192.0.2.7, spiffe://example.org/ci, or has openssl's type before it
# (email:, DNS:, IP:, URI:). The file names are Docker's: DIR/NAME can be DOCKER_CERT_PATH. DAYS in the environment is
# how long a certificate is valid: 825, for an authority 3650. Keys are P-256, readable by their owner only.
#
# Whoever has ca-key.pem can be everybody: keep it off the hosts that it is for.
set -eu
umask 077

fail() {
    echo "certs.sh: $*" >&2
    exit 1
}

usage() {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}

# What is no address, no e-mail and no URI is a host.
typed() {
    case $1 in
    DNS:* | IP:* | URI:* | email:*) echo "$1" ;;
    *://*) echo "URI:$1" ;;
    *@*) echo "email:$1" ;;
    *[!0-9.]*) case $1 in *:*) echo "IP:$1" ;; *) echo "DNS:$1" ;; esac ;;
    *) echo "IP:$1" ;;
    esac
}

key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

authority() {
    dir=$1
    [ ! -e "$dir/ca-key.pem" ] || fail "$dir has an authority already"
    mkdir -p "$dir"
    key "$dir/ca-key.pem"
    openssl req -new -x509 -sha256 -days "${DAYS:-3650}" -key "$dir/ca-key.pem" -out "$dir/ca.pem" \
        -config /dev/stdin <<EOF
[req]
prompt = no
distinguished_name = name
x509_extensions = authority
[name]
CN = execgate private CA
[authority]
basicConstraints = critical, CA:true, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
EOF
    chmod 644 "$dir/ca.pem"
}

# $1: serverAuth or clientAuth; DIR, NAME, SAN...
certificate() {
    purpose=$1 dir=$2 name=$3
    shift 3
    [ -e "$dir/ca-key.pem" ] || fail "$dir has no authority: certs.sh ca $dir"
    names=
    for san; do
        case $san in *,*) fail "$san: a name has no comma" ;; esac
        names="$names${names:+, }$(typed "$san")"
    done
    mkdir -p "$dir/$name"
    cp "$dir/ca.pem" "$dir/$name/ca.pem"
    key "$dir/$name/key.pem"
    openssl req -new -sha256 -key "$dir/$name/key.pem" -subj "/CN=$name" -out "$dir/$name/request.pem"
    # What openssl says of a success is no news.
    said=$(sign "$purpose" "$dir" "$name" "$names" 2>&1) || fail "$said"
    rm "$dir/$name/request.pem"
    chmod 644 "$dir/$name/cert.pem" "$dir/$name/ca.pem"
}

sign() {
    openssl x509 -req -sha256 -days "${DAYS:-825}" -CA "$2/ca.pem" -CAkey "$2/ca-key.pem" \
        -set_serial "0x$(openssl rand -hex 16 | sed 's/^[89a-f]/1/')" \
        -in "$2/$3/request.pem" -out "$2/$3/cert.pem" -extfile /dev/stdin <<EOF
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = $1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $4
EOF
}

case ${1:-} in
ca) [ $# = 2 ] || usage; authority "$2" ;;
server) [ $# -ge 4 ] || usage; shift; certificate serverAuth "$@" ;;
client) [ $# -ge 4 ] || usage; shift; certificate clientAuth "$@" ;;
*) usage ;;
esac
