package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx)
	check(err)
	defer client.Close()
	x, err := client.FetchX509Context(ctx)
	check(err)
	fmt.Println("x509", x.DefaultSVID().ID, x.DefaultSVID().Hint, len(x.DefaultSVID().Certificates), x.Bundles.Len())
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	check(err)
	fmt.Println("jwt", token.ID, token.Audience)
	bundles, err := client.FetchJWTBundles(ctx)
	check(err)
	parsed, err := jwtsvid.ParseAndValidate(token.Marshal(), bundles, []string{"db"})
	check(err)
	fmt.Println("validated here", parsed.ID)
	again, err := client.ValidateJWTSVID(ctx, token.Marshal(), "db")
	check(err)
	fmt.Println("validated there", again.ID)
	_, err = client.ValidateJWTSVID(ctx, token.Marshal(), "other")
	fmt.Println("other audience", err != nil)
	roots, err := client.FetchX509Bundles(ctx)
	check(err)
	fmt.Println("x509 bundles", roots.Len())
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(client))
	check(err)
	svid, err := source.GetX509SVID()
	check(err)
	own, err := source.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	check(err)
	chain := svid.Certificates
	_, _, err = x509svid.Verify(chain, own)
	fmt.Println("source", svid.ID, len(own.X509Authorities()), err)
	check(source.Close())
	keys, stopKeys := context.WithCancel(ctx)
	j := &jwtWatcher{stop: stopKeys}
	_ = client.WatchJWTBundles(keys, j)
	fmt.Println("jwt bundles", j.seen)
	watch, stop := context.WithCancel(ctx)
	defer stop()
	w := &watcher{stop: stop}
	_ = client.WatchX509Context(watch, w)
	fmt.Println("watched", w.seen)
}

type jwtWatcher struct {
	seen int
	stop func()
}

func (w *jwtWatcher) OnJWTBundlesUpdate(s *jwtbundle.Set) {
	w.seen = s.Len()
	w.stop()
}
func (w *jwtWatcher) OnJWTBundlesWatchError(err error) {
	if w.seen == 0 {
		fmt.Println("watch error", err)
	}
}

type watcher struct {
	seen int
	stop func()
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.seen++
	fmt.Println("update", c.DefaultSVID().ID)
	if w.seen == 2 {
		w.stop()
	}
}
func (w *watcher) OnX509ContextWatchError(err error) {
	if w.seen < 2 {
		fmt.Println("watch error", err)
	}
}

func check(err error) {
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}
