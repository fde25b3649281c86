//! What an attacker on the path may try, in virtual time: see tests/netns for the live engine.

use crate::crypto::Cipher;
use crate::noise::{TYPE_COOKIE, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE};
use crate::sim::{hex, inner, number_in, Datagram, Fate, Net, Node, Rng, A, B};

const AES: &str = "retinue_cipher=aes-256-gcm";
const ELSEWHERE: &str = "203.0.113.9:9";

fn up() -> Net {
    let mut net = Net::pair();
    for i in 0..20 {
        net.nodes[0].send(net.now, &inner(0, i));
        net.nodes[1].send(net.now, &inner(1, i));
        net.run(5);
    }
    net
}

fn to_b(net: &Net) -> Vec<Datagram> {
    net.log.iter().filter(|(_, d)| d.to.to_string() == B).map(|(_, d)| d.clone()).collect()
}

/// Node 1 takes these one at a time; nothing is delivered or answered, nobody moves.
fn harmless(net: &mut Net, attack: impl IntoIterator<Item = Datagram>) {
    let public = net.nodes[0].public;
    net.nodes[1].wire.sent.clear();
    let before = net.nodes[1].delivered.len();
    let at = net.nodes[1].peer(&public).endpoint.load_full();
    for d in attack {
        net.nodes[1].receive(net.now, &[d]);
        net.nodes[1].pump(net.now);
    }
    assert_eq!(net.nodes[1].delivered.len(), before);
    assert!(net.nodes[1].wire.sent.is_empty(), "not a byte in answer");
    assert_eq!(net.nodes[1].peer(&public).endpoint.load_full(), at, "nobody roams");
}

fn still_works(net: &mut Net, n: u32) {
    net.nodes[0].send(net.now, &inner(0, n));
    net.run(6_000);
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), n);
}

#[test]
fn odd_counters_types_lengths_and_every_truncation() {
    let mut net = up();
    let seeds = to_b(&net);
    let data = seeds.iter().rev().find(|d| d.bytes[0] == TYPE_DATA).unwrap().clone();
    let counter = u64::from_le_bytes(data.bytes[8..16].try_into().unwrap());
    let mut attack = Vec::new();
    for c in [
        0,
        1,
        u64::MAX,
        u64::MAX - 1,
        u64::MAX - (1 << 13),
        1 << 63,
        counter + (1 << 63),
        counter ^ (1 << 63),
    ] {
        let mut d = data.clone();
        d.bytes[8..16].copy_from_slice(&c.to_le_bytes());
        attack.push(d);
    }
    for seed in &seeds {
        for kind in (0..=5u8).chain([127, 255]) {
            for reserved in [0u8, 1, 255] {
                let mut d = seed.clone();
                if (d.bytes[0], 0) == (kind, reserved) {
                    continue;
                }
                d.bytes[0] = kind;
                d.bytes[2] = reserved;
                attack.push(d);
            }
        }
        for n in 0..seed.bytes.len() {
            let mut d = seed.clone();
            d.bytes.truncate(n);
            attack.push(d);
        }
        let mut d = seed.clone();
        d.bytes.resize(65_507, 0);
        attack.push(d);
    }
    harmless(&mut net, attack);
    still_works(&mut net, 500);
}

#[test]
fn replays_across_a_rekey_and_from_before_a_restart() {
    let mut net = up();
    for i in 0..300 {
        net.nodes[0].send(net.now, &inner(0, 1000 + i));
        net.run(1_000);
    }
    assert!(net.count(TYPE_RESPONSE, 0) >= 3, "rekeyed");
    let old = to_b(&net);
    harmless(&mut net, old.iter().cloned().map(|d| Datagram { from: ELSEWHERE.parse().unwrap(), ..d }));
    // The peer restarts: its old packets and initiations are as dead as before.
    let (a, b) = (net.nodes[0].public, net.nodes[1].public);
    let secret = {
        let c = crate::peer::lock(&net.nodes[0].core.control);
        hex(c.identity.as_ref().unwrap().secret.expose())
    };
    let psk = "11".repeat(32);
    let mut fresh = Node::new(A, net.now);
    fresh
        .set(net.now, &format!("private_key={secret}\npublic_key={}\npreshared_key={psk}\nendpoint={B}\nallowed_ip=10.0.0.2/32", hex(&b)))
        .unwrap();
    fresh.public = a;
    net.nodes[0] = fresh;
    net.nodes[0].send(net.now, &inner(0, 9000));
    net.run(500);
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 9000);
    let all = to_b(&net);
    harmless(&mut net, all);
    // We restart and know nothing: no delivery, and a recorded initiation turns nobody away.
    let secret = {
        let c = crate::peer::lock(&net.nodes[1].core.control);
        hex(c.identity.as_ref().unwrap().secret.expose())
    };
    let mut fresh = Node::new(B, net.now);
    fresh
        .set(net.now, &format!("private_key={secret}\npublic_key={}\npreshared_key={psk}\nendpoint={A}\nallowed_ip=10.0.0.1/32", hex(&a)))
        .unwrap();
    fresh.public = b;
    net.nodes[1] = fresh;
    for d in &old {
        net.nodes[1].receive(net.now, &[Datagram { from: ELSEWHERE.parse().unwrap(), ..d.clone() }]);
        net.nodes[1].pump(net.now);
        net.now += 25;
    }
    assert!(net.nodes[1].delivered.is_empty());
    let answered: usize = net.nodes[1].wire.sent.drain(..).map(|d| d.bytes.len()).sum();
    assert!(answered <= 92 * 3, "a response per initiation at most, smaller than it: {answered}");
    let endpoint = net.nodes[1].peer(&a).endpoint.load_full().unwrap();
    assert_eq!(endpoint.addr.to_string(), A, "no roaming on what may be a replay");
    assert!(!net.session_up(1), "nor a session to send with");
    net.nodes[1].send(net.now, &inner(1, 7));
    net.run(6_000);
    assert_eq!(number_in(net.nodes[0].delivered.last().unwrap()), 7);
}

#[test]
fn nobody_on_the_path_can_turn_aes_into_chacha() {
    // All the attacker can touch are bytes on the wire: flip, drop, replay, cut, swap directions.
    let mut rng = Rng(3);
    for round in 0..40 {
        let mut net = Net::pair_with(AES, AES);
        let mut recorded: Vec<Datagram> = Vec::new();
        for i in 0..12 {
            net.nodes[0].send(net.now, &inner(0, i));
            net.nodes[1].send(net.now, &inner(1, i));
            let mut forged = Vec::new();
            net.run_with(1_000, |d| {
                recorded.push(d.clone());
                let mut m = d.clone();
                let at = rng.below(m.bytes.len() as u64) as usize;
                m.bytes[at] ^= 1 << rng.below(8);
                forged.push(m);
                match (round + i) % 4 {
                    0 => Fate::Drop,
                    _ if rng.below(3) == 0 => Fate::Drop,
                    _ => Fate::Deliver(vec![1]),
                }
            });
            for d in forged.into_iter().chain(recorded.iter().rev().take(20).cloned()) {
                let to = usize::from(d.to.to_string() == B);
                net.nodes[to].receive(net.now, std::slice::from_ref(&d));
                let back = Datagram { to: d.from, from: d.to, bytes: d.bytes };
                net.nodes[1 - to].receive(net.now, &[back]);
                net.nodes[to].pump(net.now);
            }
        }
        for i in 0..2 {
            let other = net.nodes[1 - i].public;
            let peer = net.nodes[i].peer(&other);
            assert_eq!(crate::peer::lock(&peer.handshake).cipher, Cipher::Aes256Gcm);
            let delivered: Vec<u32> = net.nodes[i].delivered.iter().map(|p| number_in(p)).collect();
            let mut once = delivered.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), delivered.len(), "nothing twice");
        }
        // And once the attacker is gone, it is AES: data opens under no ChaCha key of the same handshake.
        net.run(6_000);
        net.nodes[0].send(net.now, &inner(0, 5000));
        net.run(6_000);
        assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 5000);
    }
}

#[test]
fn a_changed_offer_heals_in_both_directions_whoever_speaks() {
    for (first, speaker) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let mut net = Net::pair_with(AES, AES);
        net.nodes[0].send(net.now, &inner(0, 1));
        net.run(100);
        let keys = [net.nodes[1].public, net.nodes[0].public];
        for (step, cipher) in ["chacha20poly1305", "aes-256-gcm", "chacha20poly1305"].iter().enumerate() {
            for i in [first, 1 - first] {
                net.nodes[i]
                    .set(net.now, &format!("public_key={}\nretinue_cipher={cipher}", hex(&keys[i])))
                    .unwrap();
                net.nodes[speaker].send(net.now, &inner(speaker, 50));
                net.run(2_000);
            }
            let since = net.now;
            let n = 100 + step as u32;
            while net.nodes[1 - speaker].delivered.last().map(|p| number_in(p)) != Some(n) {
                net.nodes[speaker].send(net.now, &inner(speaker, n));
                net.run(500);
                assert!(net.now - since <= 6_000, "{first} {speaker} {cipher}");
            }
        }
    }
}

#[test]
fn a_stock_peer_gets_no_session_from_an_end_that_insists_on_aes_and_heals() {
    let mut net = Net::pair_with(AES, "");
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(20_000);
    assert!(net.nodes[1].delivered.is_empty() && !net.session_up(0));
    assert!(net.log.iter().all(|(_, d)| d.bytes[0] != TYPE_DATA), "never a packet under another cipher");
    let b = net.nodes[1].public;
    net.nodes[0].set(net.now, &format!("public_key={}\nretinue_cipher=chacha20poly1305", hex(&b))).unwrap();
    still_works(&mut net, 2);
}

#[test]
fn a_flood_of_valid_macs_is_answered_with_less_than_it_sends_and_stops_nobody_inside() {
    let mut net = up();
    let target = net.nodes[1].public;
    let mut stranger = Node::new("198.51.100.1:5", net.now);
    stranger
        .set(net.now, &format!("public_key={}\nendpoint={B}\nallowed_ip=10.0.0.2/32", hex(&target)))
        .unwrap();
    stranger.send(net.now, &inner(0, 1));
    stranger.pump(net.now);
    let hello = stranger.wire.sent.pop().unwrap();
    assert_eq!(hello.bytes[0], TYPE_INITIATION);
    let mut sent = 0;
    let before = net.nodes[1].delivered.len();
    for i in 0..50 {
        let burst: Vec<Datagram> = (0..500)
            .map(|n| Datagram {
                from: format!("198.51.{i}.{}:{}", n % 250, 1000 + n).parse().unwrap(),
                ..hello.clone()
            })
            .collect();
        sent += burst.len() * hello.bytes.len();
        net.nodes[1].receive(net.now, &burst);
        // In the middle of it, the peer's data goes through.
        net.nodes[0].send(net.now, &inner(0, 2000 + i));
        let mine: Vec<Datagram> = net.nodes[0].wire.sent.drain(..).collect();
        net.nodes[1].receive(net.now, &mine);
        net.nodes[1].pump(net.now);
        net.now += 10;
    }
    assert_eq!(net.nodes[1].delivered.len() - before, 50);
    let answers: Vec<Datagram> = net.nodes[1].wire.sent.drain(..).filter(|d| d.to.to_string() != A).collect();
    assert!(!answers.is_empty() && answers.iter().all(|d| d.bytes[0] == TYPE_COOKIE));
    let answered: usize = answers.iter().map(|d| d.bytes.len()).sum();
    assert!(answered * 2 < sent, "{answered} bytes for {sent}");
    // A peer that must handshake in the middle of it gets through with its cookie.
    net.run(200_000);
    net.nodes[0].send(net.now, &inner(0, 4000));
    for _ in 0..120 {
        let burst: Vec<Datagram> = vec![hello.clone(); 300];
        net.nodes[1].receive(net.now, &burst);
        net.run(100);
        net.nodes[1].wire.sent.clear();
    }
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 4000);
}
