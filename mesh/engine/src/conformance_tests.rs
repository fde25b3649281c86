//! Mistakes other WireGuard implementations shipped, one test each, named after the mistake.
//! Where a whole module is the answer, its own table test has more cases.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;

use crate::cookie::RateLimiter;
use crate::crypto::SecretKey;
use crate::noise::{TYPE_COOKIE, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE};
use crate::offload::{Coalescer, Span};
use crate::packet::{build, UDP};
use crate::peer::Endpoint;
use crate::replay::{Replay, WINDOW};
use crate::rx::{Received, Rx};
use crate::sim::{at, hex, inner, number_in, Datagram, Fate, Memory, Net, Node, A, B};
use crate::timers::REJECT_AFTER_MESSAGES;
use crate::tx::OVERHEAD;

fn up() -> Net {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(50);
    assert!(net.session_up(0) && net.session_up(1));
    net
}

fn endpoint(net: &Net, of: usize) -> String {
    let other = net.nodes[1 - of].public;
    let e = net.nodes[of].peer(&other).endpoint.load_full().expect("an endpoint");
    e.addr.to_string()
}

fn last_data(net: &Net) -> Datagram {
    net.log.iter().rev().find(|(_, d)| d.bytes[0] == TYPE_DATA).expect("data").1.clone()
}

#[test]
fn padding_past_the_mtu_made_packets_that_did_not_fit() {
    let mut net = up();
    net.nodes[0].core.mtu.store(1420, Relaxed);
    for len in [1, 15, 16, 17, 1000, 1392, 1393, 1400, 1420] {
        let packet = build::l4(
            "10.0.0.1".parse().unwrap(),
            "10.0.0.2".parse().unwrap(),
            UDP,
            0,
            0,
            &vec![7; 1420usize.min(len.max(1) + 28) - 28],
        );
        net.nodes[0].send(net.now, &packet);
        let sent = net.nodes[0].wire.sent.pop().unwrap().bytes.len() - OVERHEAD;
        assert!(sent >= packet.len() && sent <= 1420, "{sent} for {}", packet.len());
        assert!(sent.is_multiple_of(16) || sent == 1420, "{sent}");
    }
}

#[test]
fn counted_session_indices_told_strangers_how_many_sessions_there_are() {
    let mut seen = HashSet::new();
    for _ in 0..40 {
        let net = up();
        for (_, d) in net.log.iter().filter(|(_, d)| d.bytes[0] <= TYPE_RESPONSE) {
            seen.insert(u32::from_le_bytes(d.bytes[4..8].try_into().unwrap()));
        }
    }
    assert_eq!(seen.len(), 80, "no index twice");
    assert!(seen.iter().filter(|i| **i > u32::MAX / 2).count() > 15, "all over the range");
}

#[test]
fn roaming_on_data_only_lost_peers_that_had_just_keepalives() {
    let mut net = Net::pair_with("persistent_keepalive_interval=5", "");
    net.run(100);
    net.nodes[0].wire.from = "192.0.2.99:9".parse().unwrap();
    net.run(6_000);
    assert_eq!(endpoint(&net, 1), "192.0.2.99:9", "an empty packet is authenticated too");
}

#[test]
fn a_small_window_dropped_reordered_packets() {
    let mut r = Replay::default();
    assert_eq!(WINDOW, 8192 - 64);
    assert!(r.accept(WINDOW));
    assert!((0..WINDOW).rev().all(|c| r.accept(c)), "all of it may come in any order");
    assert!((0..=WINDOW).all(|c| !r.accept(c)), "once");
}

#[test]
fn the_message_limit_was_not_enforced_on_both_directions() {
    let mut net = up();
    let (a, b) = (net.nodes[0].public, net.nodes[1].public);
    let sending = net.nodes[0].peer(&b).current.load_full().unwrap();
    sending.set_sent(REJECT_AFTER_MESSAGES);
    net.nodes[0].send(net.now, &inner(0, 2));
    assert!(net.nodes[0].wire.sent.is_empty(), "sending stops");
    // A peer that does not stop: the very same key, one message too far.
    let mut d = last_data(&net);
    let plain = [0u8; 32];
    let mut sealed = vec![0u8; 48];
    for (counter, opened) in [(REJECT_AFTER_MESSAGES - 1, true), (REJECT_AFTER_MESSAGES, false)] {
        sending.send.seal(counter, &[], &plain, &mut sealed);
        d.bytes.truncate(8);
        d.bytes[4..8].copy_from_slice(&sending.remote_index.to_le_bytes());
        d.bytes.extend_from_slice(&counter.to_le_bytes());
        d.bytes.extend_from_slice(&sealed);
        let before = crate::sim::rx_bytes(&net.nodes[1], &a);
        net.nodes[1].receive(net.now, std::slice::from_ref(&d));
        assert_eq!(crate::sim::rx_bytes(&net.nodes[1], &a) > before, opened, "{counter:#x}");
    }
}

#[test]
fn a_32_bit_counter_repeated_its_nonces() {
    let mut net = up();
    let public = net.nodes[1].public;
    let s = net.nodes[0].peer(&public).current.load_full().unwrap();
    let mut nonces = HashSet::new();
    for base in [(1u64 << 32) - 2, 1 << 40, (1 << 60) - 9, 1 << 33] {
        s.set_sent(base);
        for n in 0..4 {
            net.nodes[0].send(net.now, &inner(0, n));
            let d = net.nodes[0].wire.sent.pop().unwrap();
            assert!(nonces.insert(d.bytes[8..16].to_vec()));
            net.nodes[1].receive(net.now, &[d]);
        }
    }
    assert!(nonces.contains(&((1u64 << 32) + 1).to_le_bytes()[..]));
    assert_eq!(net.nodes[1].delivered.len(), 1 + 12, "what is far behind the window is dropped");
}

/// A node under load, its peer's initiation, and the cookie reply to it.
fn cookie_exchange() -> (Net, Datagram, Datagram) {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.nodes[0].pump(net.now);
    let hello = net.nodes[0].wire.sent.pop().unwrap();
    net.nodes[1].receive(net.now, &vec![hello.clone(); 200]);
    net.nodes[1].pump(net.now);
    let reply = net.nodes[1].wire.sent.drain(..).find(|d| d.bytes[0] == TYPE_COOKIE).expect("a cookie reply");
    (net, hello, reply)
}

/// The initiation the peer sends after it has a cookie.
fn with_cookie(net: &mut Net) -> Datagram {
    net.run_with(5_400, |_| Fate::Drop);
    let d = net.log.iter().rev().find(|(_, d)| d.bytes[0] == TYPE_INITIATION).unwrap().1.clone();
    assert_ne!(d.bytes[132..], [0; 16], "mac2 is there");
    d
}

#[test]
fn a_cookie_without_the_port_let_everybody_behind_a_nat_use_it() {
    let (mut net, _, reply) = cookie_exchange();
    net.nodes[0].receive(net.now, &[reply]);
    net.nodes[0].pump(net.now);
    let mut retry = with_cookie(&mut net);
    for (from, answer) in [("192.0.2.1:1001", TYPE_COOKIE), (A, TYPE_RESPONSE)] {
        retry.from = from.parse().unwrap();
        // Keep it under load whatever the time: a full queue of others' messages.
        let mut bad = retry.clone();
        bad.bytes[132..].fill(1);
        bad.from = "198.51.100.7:7".parse().unwrap();
        net.nodes[1].receive(net.now, &vec![bad; 200]);
        net.nodes[1].receive(net.now, std::slice::from_ref(&retry));
        net.nodes[1].pump(net.now);
        let mine: Vec<u8> = net.nodes[1]
            .wire
            .sent
            .drain(..)
            .filter(|d| d.to.to_string() == from)
            .map(|d| d.bytes[0])
            .collect();
        assert_eq!(mine.last(), Some(&answer), "{from}: {mine:?}");
    }
}

#[test]
fn a_cookie_reply_made_the_peer_roam() {
    let (mut net, _, mut reply) = cookie_exchange();
    reply.from = "203.0.113.66:6".parse().unwrap();
    net.nodes[0].receive(net.now, &[reply]);
    net.nodes[0].pump(net.now);
    assert_eq!(endpoint(&net, 0), B);
}

#[test]
fn one_limit_for_all_let_one_flooder_lock_out_everybody() {
    let mut l = RateLimiter::default();
    let flooder = "192.0.2.1".parse().unwrap();
    assert!((0..1000).filter(|_| l.allow(1, flooder)).count() < 10);
    assert!((0..200u8).all(|i| l.allow(1, std::net::Ipv4Addr::new(198, 51, 100, i).into())));
}

#[test]
fn keepalives_answered_each_other_for_ever() {
    let mut net = up();
    net.run(30_000);
    let since = net.now;
    net.run(90_000);
    assert_eq!(net.count(TYPE_DATA, since), 0);
}

#[test]
fn persistent_keepalives_were_sent_beside_traffic() {
    let mut net = Net::pair_with("persistent_keepalive_interval=5", "");
    net.run(100);
    let since = net.now;
    for n in 0..60 {
        net.nodes[0].send(net.now, &inner(0, n));
        net.run(1_000);
    }
    let empty = net
        .log
        .iter()
        .filter(|(t, d)| {
            *t > since && d.from.to_string() == A && d.bytes.len() == OVERHEAD && d.bytes[0] == TYPE_DATA
        })
        .count();
    assert_eq!(empty, 0, "traffic keeps the mapping open by itself");
}

#[test]
fn retries_without_jitter_collided_for_ever() {
    let gaps = || {
        let mut net = Net::pair();
        net.nodes[0].send(net.now, &inner(0, 1));
        net.run_with(40_000, |_| Fate::Drop);
        let t: Vec<u64> =
            net.log.iter().filter(|(_, d)| d.bytes[0] == TYPE_INITIATION).map(|(t, _)| *t).collect();
        t.windows(2).map(|w| w[1] - w[0]).collect::<Vec<_>>()
    };
    assert_ne!(gaps(), gaps());
}

#[test]
fn the_source_was_checked_against_the_peer_s_own_list_only() {
    let mut net = up();
    let a = net.nodes[0].public;
    let other = SecretKey::random().public();
    // 10.0.0.1 is in A's list as part of a wide prefix, but more specifically another peer's.
    let lines = format!(
        "public_key={}\nreplace_allowed_ips=true\nallowed_ip=10.0.0.0/8\npublic_key={}\nallowed_ip=10.0.0.1/32",
        hex(&a),
        hex(&other)
    );
    net.nodes[1].set(net.now, &lines).unwrap();
    let before = net.nodes[1].delivered.len();
    net.nodes[0].send(net.now, &inner(0, 2));
    net.run(20);
    assert_eq!(net.nodes[1].delivered.len(), before);
    net.nodes[1].set(net.now, &format!("public_key={}\nremove=true", hex(&other))).unwrap();
    net.nodes[0].send(net.now, &inner(0, 3));
    net.run(20);
    assert_eq!(net.nodes[1].delivered.len(), before + 1);
}

#[test]
fn a_new_psk_did_nothing_until_the_peer_was_made_anew_or_cut_the_session() {
    let mut net = up();
    let keys = [net.nodes[1].public, net.nodes[0].public];
    net.nodes[0]
        .set(net.now, &format!("public_key={}\npreshared_key={}", hex(&keys[0]), "33".repeat(32)))
        .unwrap();
    assert!(net.session_up(0), "the session lives on");
    // But the next handshake needs it on both ends.
    let before = net.count(TYPE_RESPONSE, 0);
    for n in 0..200 {
        net.nodes[0].send(net.now, &inner(0, n));
        net.run(1_000);
    }
    assert!(net.count(TYPE_RESPONSE, 0) > before && !net.session_up(0));
    net.nodes[1]
        .set(net.now, &format!("public_key={}\npreshared_key={}", hex(&keys[1]), "33".repeat(32)))
        .unwrap();
    net.nodes[0].send(net.now, &inner(0, 777));
    net.run(6_000);
    assert_eq!(number_in(net.nodes[1].delivered.last().unwrap()), 777);
}

#[test]
fn an_oversized_or_oddly_cut_gro_buffer_crashed_the_receiver() {
    let mut net = up();
    net.nodes[0].send(net.now, &inner(0, 5));
    let good = net.nodes[0].wire.sent.pop().unwrap();
    for segment in [0, 1, 3, 15, 16, 31, 32, good.bytes.len(), 1000, 65_535, usize::MAX / 2] {
        for len in [0, 1, 15, 32, good.bytes.len(), 65_507, 65_535] {
            let mut bytes = good.bytes.clone();
            bytes.resize(len.max(1), 0xa5);
            let mut mem = Memory(vec![bytes]);
            let mut rx = Rx::new(Coalescer::new(true, true));
            let from = Endpoint { addr: A.parse().unwrap(), src: None };
            rx.batch(&net.nodes[1].core, at(net.now), &[Received { buf: 0, len, segment, from }], &mut mem);
            let spans: Vec<Span> = rx.coalescer.groups().iter().flat_map(|g| g.spans.clone()).collect();
            assert!(spans.iter().all(|s| s.off + s.len <= len));
        }
    }
}

#[test]
fn a_host_without_ipv6_could_not_start() {
    // The address family may be missing; a taken port is another thing (tests/netns has the live one).
    let opt = crate::udp::UdpOptions { gso: true, gro: true };
    let (pairs, port) = crate::udp::bind_all(1, 0, 0, opt).unwrap();
    assert!(pairs[0].v4.is_some() && port != 0);
}

#[test]
fn a_response_that_took_a_while_was_dropped() {
    for delay in [1, 249, 251, 2_000, 4_900] {
        let mut net = Net::pair();
        net.nodes[0].send(net.now, &inner(0, 1));
        net.run_with(15_000, |d| Fate::Deliver(vec![if d.bytes[0] == TYPE_RESPONSE { delay } else { 1 }]));
        assert_eq!(net.nodes[1].delivered, [inner(0, 1)], "{delay} ms");
        assert_eq!(net.count(TYPE_RESPONSE, 0), 1, "{delay} ms");
    }
}

#[test]
fn a_wall_clock_that_stepped_back_ended_sessions_and_locked_peers_out() {
    // All timers follow the boot clock; the wall clock only stamps initiations.
    let mut net = up();
    let wrong = |n: &mut Node, now: u64, packet: &[u8], wall_secs: u64, wire: &mut Vec<Datagram>| {
        n.send(now, packet);
        let mut actions = Vec::new();
        let t = crate::device::Now { wall_secs, ..at(now) };
        while let Some((e, backlog)) = n.core.queue.pop() {
            n.core.handle(e, backlog, t, &mut actions);
        }
        for a in actions {
            if let crate::device::Action::ToPeer(_, m) = a {
                wire.push(Datagram {
                    from: A.parse().unwrap(),
                    to: B.parse().unwrap(),
                    bytes: m.bytes().to_vec(),
                });
            }
        }
    };
    net.run(200_000);
    let mut wire = Vec::new();
    let now = net.now;
    let present = at(now).wall_secs;
    // Ten years ahead once: the initiation is taken, the answer is lost.
    wrong(&mut net.nodes[0], now, &inner(0, 2), present + 315_360_000, &mut wire);
    assert_eq!(wire.len(), 1);
    let jumped = wire.pop().unwrap();
    net.nodes[1].receive(net.now, std::slice::from_ref(&jumped));
    net.nodes[1].pump(net.now);
    assert_eq!(net.nodes[1].wire.sent.drain(..).filter(|d| d.bytes[0] == TYPE_RESPONSE).count(), 1);
    // The clock is right again; the attacker replays the initiation from the future all the time.
    let since = net.now;
    let before = net.nodes[1].delivered.len();
    while net.nodes[1].delivered.len() == before {
        net.nodes[1].receive(net.now, std::slice::from_ref(&jumped));
        net.nodes[1].pump(net.now);
        net.nodes[0].send(net.now, &inner(0, 3));
        net.run(1_000);
        assert!(net.now - since <= 60_000, "back within a minute");
    }
    assert!(net.session_up(0) && net.session_up(1));
}
