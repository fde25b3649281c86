//! The protocol in virtual time: two cores back to back over networks that misbehave.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;

use crate::crypto::SecretKey;
use crate::noise::{TYPE_COOKIE, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE};
use crate::packet::{build, UDP};
use crate::sim::{hex, inner, number_in, rx_bytes, Datagram, Fate, Net, Node, Rng, A, B};
use crate::timers::REJECT_AFTER_MESSAGES;

#[test]
fn the_first_packet_brings_the_tunnel_up_and_arrives() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 7));
    net.run(100);
    assert_eq!(net.nodes[1].delivered, [inner(0, 7)]);
    assert_eq!((net.count(TYPE_INITIATION, 0), net.count(TYPE_RESPONSE, 0)), (1, 1));
    net.nodes[1].send(net.now, &inner(1, 8));
    net.run(100);
    assert_eq!(net.nodes[0].delivered, [inner(1, 8)]);
    assert_eq!(net.count(TYPE_INITIATION, 0), 1, "the responder uses the confirmed session");
    let (a, b) = (net.nodes[0].public, net.nodes[1].public);
    // Initiation or response, then one padded data message each way (and no keepalive yet).
    assert_eq!(rx_bytes(&net.nodes[1], &a), 148 + 32 + 32);
    assert_eq!(rx_bytes(&net.nodes[0], &b), 92 + 32 + 32);
}

#[test]
fn passive_keepalive_after_ten_seconds_and_never_an_answer_to_it() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(1000);
    let quiet = net.now;
    net.run(60_000);
    let keepalives: Vec<u64> =
        net.log.iter().filter(|(t, d)| *t >= quiet && d.bytes[0] == TYPE_DATA).map(|(t, _)| *t).collect();
    assert_eq!(keepalives.len(), 1, "one from the receiver, none in reply");
    assert!((9_000..=10_100).contains(&(keepalives[0] - quiet + 1000)), "{keepalives:?}");
    assert_eq!(net.count(TYPE_INITIATION, quiet), 0, "a keepalive is a sign of life");
}

#[test]
fn persistent_keepalive_starts_at_once_and_keeps_its_interval() {
    let mut net = Net::pair_with("persistent_keepalive_interval=25", "");
    net.run(1000);
    assert!(net.session_up(0) && net.session_up(1));
    let since = net.now;
    net.run(100_000);
    let sent = net.log.iter().filter(|(t, d)| *t > since && d.from.to_string() == A && d.bytes.len() == 32);
    assert_eq!(sent.count(), 4);
    let public = net.nodes[1].public;
    net.nodes[0]
        .set(net.now, &format!("public_key={}\npersistent_keepalive_interval=0", hex(&public)))
        .unwrap();
    let since = net.now;
    net.run(100_000);
    assert_eq!(net.count(TYPE_DATA, since), 0);
}

#[test]
fn silence_makes_the_sender_try_for_ninety_seconds_with_jitter() {
    let mut net = Net::pair();
    let start = net.now;
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run_with(200_000, |_| Fate::Drop);
    let tries: Vec<u64> =
        net.log.iter().filter(|(_, d)| d.bytes[0] == TYPE_INITIATION).map(|(t, _)| *t).collect();
    assert_eq!(tries.len(), 19, "the first and 18 more");
    for w in tries.windows(2) {
        assert!((5_000..5_400).contains(&(w[1] - w[0])), "{w:?}");
    }
    assert!(tries[18] - start < 97_300);
    let gaps: HashSet<u64> = tries.windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps.len() > 3, "the spacing is jittered: {gaps:?}");
    // Traffic later starts afresh.
    net.nodes[0].send(net.now, &inner(0, 2));
    net.run(100);
    assert_eq!(net.nodes[1].delivered, [inner(0, 2)], "the given-up packet was dropped");
}

#[test]
fn rekeys_every_two_minutes_without_losing_a_packet() {
    let mut net = Net::pair();
    let mut sent = 0;
    for i in 0..6000 {
        net.nodes[i % 2].send(net.now, &inner(i % 2, i as u32));
        sent += 1;
        net.run(100);
    }
    net.run(1000);
    let got = net.nodes[0].delivered.len() + net.nodes[1].delivered.len();
    assert_eq!(got, sent);
    let handshakes = net.count(TYPE_RESPONSE, 0);
    assert!((5..=6).contains(&handshakes), "{handshakes} in ten minutes");
}

#[test]
fn old_keys_are_refused_after_three_minutes() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(1000);
    net.nodes[1].send(net.now, &inner(1, 2));
    let late = net.nodes[1].wire.sent.pop().unwrap();
    let since = net.now;
    net.run_with(180_000, |_| Fate::Drop);
    net.nodes[0].receive(net.now, &[late]);
    assert!(net.nodes[0].delivered.is_empty());
    net.nodes[0].send(net.now, &inner(0, 3));
    net.collect(&mut |_| Fate::Drop);
    assert!(!net.log.iter().any(|(t, d)| *t >= since && d.bytes[0] == TYPE_DATA && d.bytes.len() > 32));
    assert!(!net.session_up(0));
}

#[test]
fn message_limits_hold_in_both_directions() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(100);
    let public = net.nodes[1].public;
    let s = net.nodes[0].peer(&public).current.load_full().unwrap();
    s.set_sent(REJECT_AFTER_MESSAGES - 1);
    net.nodes[0].send(net.now, &inner(0, 2));
    net.run(10);
    assert_eq!(net.nodes[1].delivered.len(), 2, "the last counter is usable");
    for n in 3..10 {
        net.nodes[0].send(net.now, &inner(0, n));
    }
    assert!(net.nodes[0].wire.sent.is_empty(), "beyond the limit nothing leaves, it waits");
    assert_eq!(s.nonces(1), None);
    // A forged counter beyond the limit is not even decrypted.
    let mut d = net.log.iter().rev().find(|(_, d)| d.bytes[0] == TYPE_DATA).unwrap().1.clone();
    d.bytes[8..16].copy_from_slice(&REJECT_AFTER_MESSAGES.to_le_bytes());
    net.nodes[1].receive(net.now, &[d]);
    assert_eq!(net.nodes[1].delivered.len(), 2);
    // Rekey-after-messages asks for a new session long before.
    net.run(6000);
    net.nodes[0].send(net.now, &inner(0, 11));
    net.run(100);
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 11);
}

#[test]
fn both_ends_starting_at_once_still_agree() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.nodes[1].send(net.now, &inner(1, 2));
    net.run(50);
    assert_eq!(net.nodes[0].delivered, [inner(1, 2)]);
    assert_eq!(net.nodes[1].delivered, [inner(0, 1)]);
    for i in 0..20 {
        net.nodes[i % 2].send(net.now, &inner(i % 2, i as u32));
        net.run(10);
    }
    assert_eq!(net.nodes[0].delivered.len() + net.nodes[1].delivered.len(), 22);
}

#[test]
fn loss_reorder_and_duplication_never_duplicate_a_delivery() {
    for seed in 0..8 {
        let mut net = Net::pair();
        let mut rng = Rng(seed);
        let mut sent = 0;
        for i in 0..2000u32 {
            let from = rng.below(2) as usize;
            net.nodes[from].send(net.now, &inner(from, i));
            sent += 1;
            net.run_with(rng.below(400), |_| match rng.below(10) {
                0 | 1 => Fate::Drop,
                2 => Fate::Deliver(vec![1, 1 + rng.below(300)]),
                _ => Fate::Deliver(vec![1 + rng.below(50)]),
            });
        }
        net.run(2000);
        let all: Vec<u32> = net.nodes.iter().flat_map(|n| n.delivered.iter().map(|p| number_in(p))).collect();
        let unique: HashSet<&u32> = all.iter().collect();
        assert_eq!(unique.len(), all.len(), "seed {seed}: a packet came twice");
        assert!(all.len() > sent * 7 / 10, "seed {seed}: only {} of {sent}", all.len());
        for (i, n) in net.nodes.iter().enumerate() {
            assert!(n.delivered.iter().all(|p| *p == inner(1 - i, number_in(p))), "seed {seed}");
        }
    }
}

#[test]
fn ten_thousand_replays_deliver_and_answer_nothing() {
    let mut net = Net::pair();
    for i in 0..500 {
        net.nodes[0].send(net.now, &inner(0, i));
        net.run(5);
    }
    let recorded: Vec<Datagram> =
        net.log.iter().filter(|(_, d)| d.to.to_string() == B).map(|(_, d)| d.clone()).collect();
    let before = net.nodes[1].delivered.len();
    let mut rng = Rng(5);
    let public = net.nodes[0].public;
    let endpoint = net.nodes[1].peer(&public).endpoint.load_full().unwrap();
    for _ in 0..10_000 {
        let mut d = recorded[rng.below(recorded.len() as u64) as usize].clone();
        d.from = "203.0.113.9:9".parse().unwrap();
        net.nodes[1].receive(net.now, &[d]);
        net.nodes[1].pump(net.now);
    }
    assert_eq!(net.nodes[1].delivered.len(), before);
    assert!(net.nodes[1].wire.sent.is_empty(), "not a byte in answer");
    assert_eq!(net.nodes[1].peer(&public).endpoint.load_full().unwrap(), endpoint, "no roaming either");
}

#[test]
fn a_hundred_thousand_mutations_deliver_and_answer_nothing() {
    let mut net = Net::pair();
    for i in 0..50 {
        net.nodes[0].send(net.now, &inner(0, i));
        net.nodes[1].send(net.now, &inner(1, i));
        net.run(5);
    }
    // Fresh material too: an initiation and data that never arrived.
    net.nodes[0].send(net.now, &inner(0, 1000));
    net.collect(&mut |_| Fate::Drop);
    let stranger = Node::new("198.51.100.1:5", net.now);
    let seeds: Vec<Datagram> =
        net.log.iter().filter(|(_, d)| d.to.to_string() == B).map(|(_, d)| d.clone()).collect();
    let before = net.nodes[1].delivered.len();
    let mut rng = Rng(11);
    for round in 0..100_000u64 {
        let mut d = seeds[rng.below(seeds.len() as u64) as usize].clone();
        match rng.below(4) {
            0 => d.bytes.truncate(rng.below(d.bytes.len() as u64) as usize),
            1 => d.bytes.extend((0..1 + rng.below(40)).map(|i| i as u8)),
            2 => d.bytes = (0..rng.below(200)).map(|_| rng.below(256) as u8).collect(),
            _ => {}
        }
        for _ in 0..1 + rng.below(3) {
            if !d.bytes.is_empty() {
                let at = rng.below(d.bytes.len() as u64) as usize;
                d.bytes[at] ^= 1 << rng.below(8);
            }
        }
        if rng.below(2) == 0 && !d.bytes.is_empty() {
            d.bytes[0] = 1 + rng.below(4) as u8;
        }
        if seeds.iter().any(|s| s.bytes == d.bytes) {
            continue;
        }
        net.nodes[1].receive(net.now, &[d]);
        if round % 64 == 0 {
            net.nodes[1].pump(net.now);
        }
    }
    net.nodes[1].pump(net.now);
    assert_eq!(net.nodes[1].delivered.len(), before);
    assert!(net.nodes[1].wire.sent.is_empty());
    drop(stranger);
    net.nodes[0].send(net.now, &inner(0, 2000));
    net.run(50);
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 2000, "the tunnel still works");
}

#[test]
fn a_stranger_with_a_valid_mac_gets_silence() {
    let mut net = Net::pair();
    let target = net.nodes[1].public;
    let mut c = Node::new("198.51.100.1:5", net.now);
    c.set(net.now, &format!("public_key={}\nendpoint={B}\nallowed_ip=10.0.0.2/32", hex(&target))).unwrap();
    c.send(net.now, &inner(0, 1));
    c.pump(net.now);
    let hello = c.wire.sent.clone();
    assert_eq!(hello[0].bytes[0], TYPE_INITIATION);
    net.nodes[1].receive(net.now, &hello);
    net.nodes[1].pump(net.now);
    assert!(net.nodes[1].wire.sent.is_empty());
}

#[test]
fn source_addresses_are_checked_against_the_whole_device() {
    let mut net = Net::pair();
    // Node 1 gives a more specific prefix of A's wide one to another peer.
    let (a, b) = (net.nodes[0].public, net.nodes[1].public);
    let other = SecretKey::random().public();
    let set = format!(
        "public_key={}\nallowed_ip=10.9.0.0/16\npublic_key={}\nallowed_ip=10.9.1.0/24",
        hex(&a),
        hex(&other)
    );
    net.nodes[1].set(net.now, &set).unwrap();
    net.nodes[0].set(net.now, &format!("public_key={}\nallowed_ip=10.0.0.0/24", hex(&b))).unwrap();
    let from = |ip: &str| build::l4(ip.parse().unwrap(), "10.0.0.2".parse().unwrap(), UDP, 0, 0, b"abcd");
    for (ip, ok) in [("10.0.0.1", true), ("10.9.2.2", true), ("10.9.1.2", false), ("10.7.0.1", false)] {
        let before = net.nodes[1].delivered.len();
        net.nodes[0].send(net.now, &from(ip));
        net.run(20);
        assert_eq!(net.nodes[1].delivered.len() - before, usize::from(ok), "{ip}");
    }
    // Inner garbage under a valid tag is dropped as well.
    let before = net.nodes[1].delivered.len();
    let mut bad = inner(0, 1);
    bad[2] = 0xff;
    net.nodes[0].send(net.now, &bad);
    net.run(20);
    assert_eq!(net.nodes[1].delivered.len(), before);
}

#[test]
fn roams_on_authenticated_packets_only() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(50);
    let public = net.nodes[0].public;
    let endpoint = |net: &Net| net.nodes[1].peer(&public).endpoint.load().as_ref().unwrap().addr.to_string();
    assert_eq!(endpoint(&net), A);
    net.nodes[0].wire.from = "192.0.2.77:7777".parse().unwrap();
    net.nodes[0].send(net.now, &inner(0, 2));
    let mut forged = net.nodes[0].wire.sent[0].clone();
    *forged.bytes.last_mut().unwrap() ^= 1;
    net.nodes[1].receive(net.now, &[forged]);
    assert_eq!(endpoint(&net), A);
    net.run(50);
    assert_eq!(endpoint(&net), "192.0.2.77:7777");
    net.nodes[1].send(net.now, &inner(1, 3));
    net.run(50);
    assert_eq!(net.nodes[0].delivered, [inner(1, 3)]);
}

#[test]
fn under_load_a_cookie_is_asked_for_and_honoured() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.nodes[0].pump(net.now);
    let hello = net.nodes[0].wire.sent.pop().unwrap();
    // A burst of valid-mac initiations fills the queue.
    let flood: Vec<Datagram> = (0..200).map(|_| hello.clone()).collect();
    net.nodes[1].receive(net.now, &flood);
    net.nodes[1].pump(net.now);
    let answers = std::mem::take(&mut net.nodes[1].wire.sent);
    let cookies = answers.iter().filter(|d| d.bytes[0] == TYPE_COOKIE).count();
    assert!(cookies >= 190, "{cookies}");
    assert_eq!(answers.iter().filter(|d| d.bytes[0] == TYPE_RESPONSE).count(), 0);
    net.nodes[0].receive(net.now, &answers);
    net.nodes[0].pump(net.now);
    // Still under load: the retry carries mac2 and is answered.
    for _ in 0..60 {
        net.run_with(
            100,
            |d| if d.bytes[0] == TYPE_INITIATION { Fate::Drop } else { Fate::Deliver(vec![1]) },
        );
        net.nodes[1].receive(net.now, &flood);
        net.nodes[1].pump(net.now);
        net.nodes[1].wire.sent.clear();
    }
    let retry = net.log.iter().rev().find(|(_, d)| d.bytes[0] == TYPE_INITIATION).unwrap().1.clone();
    assert_ne!(retry.bytes[132..], [0; 16], "mac2 is there");
    net.nodes[1].receive(net.now, &flood);
    net.nodes[1].receive(net.now, std::slice::from_ref(&retry));
    net.nodes[1].pump(net.now);
    let answered = net.nodes[1].wire.sent.iter().filter(|d| d.bytes[0] == TYPE_RESPONSE).count();
    assert_eq!(answered, 1);
    let mut elsewhere = retry;
    elsewhere.from = "192.0.2.1:1001".parse().unwrap();
    net.nodes[1].wire.sent.clear();
    net.nodes[1].receive(net.now, &[elsewhere]);
    net.nodes[1].pump(net.now);
    assert_eq!(net.nodes[1].wire.sent[0].bytes[0], TYPE_COOKIE, "the cookie is bound to the port");
}

#[test]
fn ciphers_agree_or_there_is_no_session_and_a_change_heals_itself() {
    let aes = "retinue_cipher=aes-256-gcm";
    let mut net = Net::pair_with(aes, aes);
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(50);
    assert_eq!(net.nodes[1].delivered, [inner(0, 1)]);
    let (a, b) = (net.nodes[0].public, net.nodes[1].public);
    net.nodes[1].set(net.now, &format!("public_key={}\nretinue_cipher=chacha20poly1305", hex(&a))).unwrap();
    assert!(!net.session_up(1));
    net.nodes[0].send(net.now, &inner(0, 2));
    net.run(30_000);
    assert_eq!(net.nodes[1].delivered.len(), 1, "no session under two ciphers");
    net.nodes[0].set(net.now, &format!("public_key={}\nretinue_cipher=chacha20poly1305", hex(&b))).unwrap();
    net.nodes[0].send(net.now, &inner(0, 3));
    net.run(6_000);
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 3);
}

#[test]
fn a_removed_peer_is_dark_at_the_next_packet() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(50);
    net.nodes[0].send(net.now, &inner(0, 2));
    let in_flight = std::mem::take(&mut net.nodes[0].wire.sent);
    let a = net.nodes[0].public;
    let peer = net.nodes[1].peer(&a);
    net.nodes[1].set(net.now, &format!("public_key={}\nremove=true", hex(&a))).unwrap();
    net.nodes[1].receive(net.now, &in_flight);
    net.nodes[1].send(net.now, &inner(1, 3));
    net.nodes[1].pump(net.now);
    assert_eq!(net.nodes[1].delivered.len(), 1);
    assert!(net.nodes[1].wire.sent.is_empty());
    assert!(peer.dead.load(Relaxed) && peer.current.load().is_none());
    net.run(300_000);
    assert_eq!(net.count(TYPE_RESPONSE, 0), 1, "nor does it get handshakes");
    assert_eq!(crate::peer::lock(&peer.handshake).psk[..], [0; 32], "secrets do not wait for a timer");
    net.run(300_000);
    // And the record is freed when its last timer ran out.
    let weak = std::sync::Arc::downgrade(&peer);
    drop(peer);
    assert!(weak.upgrade().is_none());
}

#[test]
fn a_new_psk_holds_from_the_next_handshake_without_a_reset() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(50);
    let keys = [net.nodes[1].public, net.nodes[0].public];
    for (i, k) in keys.iter().enumerate() {
        let line = format!("public_key={}\npreshared_key={}", hex(k), "22".repeat(32));
        net.nodes[i].set(net.now, &line).unwrap();
    }
    assert!(net.session_up(0));
    for i in 0..400 {
        net.nodes[0].send(net.now, &inner(0, 100 + i));
        net.run(1000);
    }
    assert_eq!(net.nodes[1].delivered.len(), 401);
}

#[test]
fn zero_keys_after_three_lifetimes() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(20_000);
    assert_eq!(net.nodes[0].core.index.read().unwrap().len(), 1);
    net.run(3 * 180_000);
    for n in &net.nodes {
        assert!(n.core.index.read().unwrap().is_empty(), "all sessions are gone");
    }
}

#[test]
fn packets_wait_for_an_endpoint_or_a_key_without_busy_work() {
    let mut net = Net::pair();
    let (a, b) = (net.nodes[0].public, net.nodes[1].public);
    // A fresh peer without endpoint: sending asks the control side for nothing.
    net.nodes[0].set(net.now, &format!("public_key={}\nremove=true", hex(&b))).unwrap();
    let section =
        format!("public_key={}\npreshared_key={}\nallowed_ip=10.0.0.2/32", hex(&b), "11".repeat(32));
    net.nodes[0].set(net.now, &section).unwrap();
    while net.nodes[0].core.queue.pop().is_some() {}
    for n in 0..300 {
        net.nodes[0].send(net.now, &inner(0, n));
    }
    assert!(net.nodes[0].core.queue.pop().is_none());
    net.run(50);
    assert_eq!(net.count(TYPE_INITIATION, 0), 0);
    net.nodes[0].set(net.now, &format!("public_key={}\nendpoint={B}", hex(&b))).unwrap();
    net.run(50);
    assert_eq!(net.nodes[1].delivered.len(), 128, "the newest ones were kept");
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 299);
    // Without a private key nothing is tried more than every five seconds.
    let mut c = Node::new("198.51.100.1:5", net.now);
    c.set(
        net.now,
        &format!(
            "private_key={}\npublic_key={}\nendpoint={B}\nallowed_ip=10.0.0.2/32",
            "0".repeat(64),
            hex(&a)
        ),
    )
    .unwrap();
    c.send(net.now, &inner(0, 1));
    c.pump(net.now);
    c.send(net.now, &inner(0, 2));
    assert!(c.core.queue.pop().is_none() && c.wire.sent.is_empty());
}
