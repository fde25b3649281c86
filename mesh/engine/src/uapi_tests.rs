//! UAPI: what is accepted, what is refused whole, and what a `set` does to the snapshot.

use std::io::BufReader;
use std::sync::Arc;

use crate::peer::lock;
use crate::server::{read_request, Request};
use crate::sim::{hex, inner, Net, Node, Rng, A};
use crate::uapi::{configure, parse_set, report_core, Errno};

const K1: &str = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";
const K2: &str = "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376";

fn parse(s: &str) -> bool {
    parse_set(s.lines()).is_ok()
}

#[test]
fn accepted_and_refused_lines() {
    let peer = format!("public_key={K1}\n");
    for good in [
        "",
        "listen_port=0",
        "listen_port=65535",
        "fwmark=0",
        "fwmark=4294967295",
        "fwmark=0x1f",
        "replace_peers=true",
        &format!("private_key={K1}"),
        &peer,
        &format!("{peer}remove=true"),
        &format!("{peer}update_only=true"),
        &format!("{peer}preshared_key={K2}"),
        &format!("{peer}endpoint=192.0.2.1:1"),
        &format!("{peer}endpoint=[2001:db8::1]:65535"),
        &format!("{peer}endpoint=[fe80::1%1]:5"),
        &format!("{peer}endpoint=[fe80::1%lo]:5"),
        &format!("{peer}persistent_keepalive_interval=0"),
        &format!(
            "{peer}replace_allowed_ips=true\nallowed_ip=10.0.0.0/8\nallowed_ip=::/0\nallowed_ip=-10.0.0.0/8"
        ),
        &format!("{peer}protocol_version=1\nretinue_cipher=aes-256-gcm\npublic_key={K2}"),
    ] {
        assert!(parse(good), "{good}");
    }
    for bad in [
        "listen_port",
        "listen_port=",
        "listen_port=65536",
        "listen_port=-1",
        "listen_port=+1",
        "listen_port= 1",
        "fwmark=0x",
        "fwmark=x",
        "fwmark=4294967296",
        "replace_peers=false",
        "replace_peers=1",
        "unknown=1",
        "endpoint=192.0.2.1:1",
        "private_key=",
        &format!("private_key={}", &K1[1..]),
        &format!("private_key={}g", &K1[1..]),
        &format!("public_key={K1}0"),
        &format!("{peer}private_key={K1}"),
        &format!("{peer}listen_port=1"),
        &format!("{peer}remove=false"),
        &format!("{peer}endpoint=example.org:1"),
        &format!("{peer}endpoint=192.0.2.1"),
        &format!("{peer}endpoint=192.0.2.1:65536"),
        &format!("{peer}endpoint=[fe80::1%no-such-link]:5"),
        &format!("{peer}persistent_keepalive_interval=65536"),
        &format!("{peer}persistent_keepalive_interval=off"),
        &format!("{peer}allowed_ip=10.0.0.0"),
        &format!("{peer}allowed_ip=10.0.0.0/33"),
        &format!("{peer}allowed_ip=::/129"),
        &format!("{peer}allowed_ip=10.0.0/8"),
        &format!("{peer}allowed_ip=/8"),
        &format!("{peer}allowed_ip=--10.0.0.0/8"),
        &format!("{peer}protocol_version=2"),
        &format!("{peer}retinue_cipher=rot13"),
        &format!("{peer}bogus=1"),
        &format!("{peer}\u{0}=1"),
    ] {
        assert!(!parse(bad), "{bad}");
    }
}

fn owner(n: &Node, ip: &str) -> Option<String> {
    n.core.routes.load().lookup(ip.parse().unwrap()).map(|p| hex(&p.public))
}

#[test]
fn an_invalid_line_changes_nothing() {
    let mut n = Node::new(A, 1);
    n.set(1, &format!("public_key={K1}\nallowed_ip=10.0.0.1/32")).unwrap();
    let snapshot = n.core.routes.load_full();
    let bad = format!("replace_peers=true\npublic_key={K2}\nallowed_ip=10.0.0.1/32\nallowed_ip=x");
    assert!(n.set(1, &bad).is_err());
    assert!(Arc::ptr_eq(&snapshot, &n.core.routes.load_full()));
    assert_eq!(owner(&n, "10.0.0.1").as_deref(), Some(K1));
}

#[test]
fn an_allowed_ip_has_one_owner_and_moves_in_one_step() {
    let mut n = Node::new(A, 1);
    n.set(1, &format!("public_key={K1}\nallowed_ip=10.0.0.1/32\nallowed_ip=10.0.0.2/32")).unwrap();
    let before = n.core.routes.load_full();
    n.set(1, &format!("public_key={K2}\nallowed_ip=10.0.0.1/32")).unwrap();
    assert_eq!(owner(&n, "10.0.0.1").as_deref(), Some(K2));
    assert_eq!(before.lookup("10.0.0.1".parse().unwrap()).map(|p| hex(&p.public)).as_deref(), Some(K1));
    let text = report(&n);
    assert_eq!(text.matches("allowed_ip=10.0.0.1/32").count(), 1);
    // Taking away what another peer owns now is no theft.
    n.set(1, &format!("public_key={K1}\nallowed_ip=-10.0.0.1/32\nallowed_ip=-10.0.0.2/32")).unwrap();
    assert_eq!(owner(&n, "10.0.0.1").as_deref(), Some(K2));
    assert_eq!(owner(&n, "10.0.0.2"), None);
    n.set(1, &format!("public_key={K2}\nremove=true")).unwrap();
    assert_eq!(owner(&n, "10.0.0.1"), None);
}

#[test]
fn peer_flags() {
    let mut n = Node::new(A, 1);
    n.set(1, &format!("public_key={K1}\nupdate_only=true\nallowed_ip=10.0.0.1/32")).unwrap();
    assert_eq!(owner(&n, "10.0.0.1"), None, "update_only makes no peer");
    n.set(1, &format!("public_key={K1}\nallowed_ip=10.0.0.1/32\npublic_key={K2}\nallowed_ip=10.0.0.2/32"))
        .unwrap();
    n.set(1, &format!("public_key={K1}\nreplace_allowed_ips=true\nallowed_ip=10.0.0.3/32")).unwrap();
    assert_eq!((owner(&n, "10.0.0.1"), owner(&n, "10.0.0.3").as_deref()), (None, Some(K1)));
    n.set(1, &format!("replace_peers=true\npublic_key={K2}\nallowed_ip=10.0.0.9/32")).unwrap();
    assert_eq!((owner(&n, "10.0.0.3"), owner(&n, "10.0.0.2")), (None, None));
    assert_eq!(owner(&n, "10.0.0.9").as_deref(), Some(K2));
    let own = hex(&n.public);
    n.set(1, &format!("public_key={own}\nallowed_ip=10.0.0.4/32")).unwrap();
    assert_eq!(owner(&n, "10.0.0.4"), None, "a device is not its own peer");
}

fn report(n: &Node) -> String {
    let mut out = Vec::new();
    report_core(&n.core, 51820, 7, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn a_report_can_be_set_again() {
    let mut net = Net::pair_with(
        "persistent_keepalive_interval=25\nretinue_cipher=aes-256-gcm",
        "retinue_cipher=aes-256-gcm",
    );
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(100);
    let text = report(&net.nodes[0]);
    for want in [
        "listen_port=51820\n",
        "fwmark=7\n",
        "protocol_version=1\n",
        "retinue_cipher=aes-256-gcm\n",
        "rx_bytes=",
    ] {
        assert!(text.contains(want), "{want} in {text}");
    }
    assert!(text.contains("last_handshake_time_sec=1700001"), "{text}");
    assert!(text.ends_with("errno=0\n\n"));
    let settable: Vec<&str> = text
        .lines()
        .filter(|l| {
            !["errno", "rx_bytes", "tx_bytes", "last_handshake_time_sec", "last_handshake_time_nsec", ""]
                .contains(&l.split('=').next().unwrap())
        })
        .collect();
    let n = Node::new(A, 1);
    configure(&n.core, parse_set(settable.iter().copied()).unwrap(), 1);
    let again = report(&n);
    assert!(settable.iter().all(|l| again.contains(l)));
    assert!(!report(&Node::new(A, 1)).contains("retinue_cipher"), "only where it was named");
}

fn request(bytes: &[u8]) -> Result<Request, std::io::Error> {
    read_request(&mut BufReader::new(bytes))
}

#[test]
fn framing() {
    assert!(matches!(request(b"get=1\n\n"), Ok(Request::Get)));
    assert!(matches!(request(b"\n\nget=1\n\n"), Ok(Request::Get)));
    assert!(matches!(request(b""), Ok(Request::End)));
    assert!(
        matches!(request(b"set=1\nlisten_port=1\n\n"), Ok(Request::Set(t)) if t.as_str() == "listen_port=1\n\n")
    );
    for bad in [&b"get=2\n\n"[..], b"set=0\n\n", b"GET / HTTP/1.1\n\n", b"get=1\nx\n\n", b"set\n\n"] {
        assert!(matches!(request(bad), Ok(Request::Bad(Errno(libc::EINVAL)))), "{bad:?}");
    }
    assert!(matches!(request(b"set=1\nlisten_port=1\n"), Ok(Request::Bad(Errno(libc::EPROTO)))), "cut off");
    assert!(request(b"set=1\n\xff\xfe\n\n").is_err());
}

#[test]
fn random_lines_never_panic_and_never_half_apply() {
    let words = [
        "public_key",
        "allowed_ip",
        "endpoint",
        "set",
        "=",
        "\n",
        K1,
        K2,
        "10.0.0.1/32",
        "true",
        "remove",
        "-",
        "::/0",
        "%",
        "[",
        "]:",
        "\u{e9}",
        "0",
        "65536",
    ];
    let mut rng = Rng(1);
    let mut n = Node::new(A, 1);
    for _ in 0..20_000 {
        let text: String =
            (0..rng.below(14)).map(|_| words[rng.below(words.len() as u64) as usize]).collect();
        let before = n.core.routes.load_full();
        if n.set(1, &text).is_err() {
            assert!(Arc::ptr_eq(&before, &n.core.routes.load_full()));
        }
        for p in lock(&n.core.control).peers.values() {
            for a in lock(&p.allowed).iter() {
                assert!(n.core.routes.load().lookup(a.addr()).is_some());
            }
        }
    }
}

#[test]
fn ten_thousand_peers_then_one_change_is_small() {
    let mut n = Node::new(A, 1);
    let mut text = String::new();
    for i in 0..10_000u32 {
        let b = i.to_be_bytes();
        text += &format!(
            "public_key={:064x}\nallowed_ip=10.{}.{}.{}/32\nallowed_ip=fd00::{:x}/128\n",
            u128::from(i) + 1,
            b[1],
            b[2],
            b[3],
            i + 1
        );
    }
    n.set(1, &text).unwrap();
    let old = n.core.routes.load_full();
    n.set(1, &format!("public_key={:064x}\nallowed_ip=10.0.0.7/32", 9000)).unwrap();
    assert_eq!(owner(&n, "10.0.0.7").unwrap(), format!("{:064x}", 9000));
    let (shared, fresh) = n.core.routes.load().sharing(&old);
    assert!(fresh < 40 && shared > 10, "{shared} shared and {fresh} fresh subtrees on the changed path");
    assert_eq!(report(&n).matches("public_key=").count(), 10_000);
}
